# SPDX-License-Identifier: Apache-2.0
"""The published decoding loops, written out plainly from their description: oracles for the engine."""

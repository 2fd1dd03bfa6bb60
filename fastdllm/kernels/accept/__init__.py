# SPDX-License-Identifier: Apache-2.0
"""Which masked positions of a block are committed in one step."""

# SPDX-License-Identifier: Apache-2.0
"""How much the positions of a block attend to each other, out of all that they attend to."""

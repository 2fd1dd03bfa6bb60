# SPDX-License-Identifier: Apache-2.0
"""Dream: the published functions and commands, over the core."""

# SPDX-License-Identifier: Apache-2.0
"""Fast-dLLM v2: the published functions and commands, over the core."""

# SPDX-License-Identifier: Apache-2.0
"""LLaDA: the published functions and commands, over the core."""

# SPDX-License-Identifier: Apache-2.0
"""Turning an autoregressive Qwen2 checkpoint into a block-diffusion one, and fine-tuning the result."""

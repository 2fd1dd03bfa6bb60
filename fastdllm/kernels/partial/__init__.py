# SPDX-License-Identifier: Apache-2.0
"""Layers that run for some positions only: which ones, their inputs, and the way back to all positions."""

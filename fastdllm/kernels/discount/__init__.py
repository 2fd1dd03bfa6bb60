# SPDX-License-Identifier: Apache-2.0
"""Confidences, lowered by attention to what would be committed with them."""

# SPDX-License-Identifier: Apache-2.0
"""Attention of a window's queries over the KV store, with per-query lengths."""

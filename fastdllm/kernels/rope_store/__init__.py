# SPDX-License-Identifier: Apache-2.0
"""Rotary embedding of queries and keys, and the write of keys and values into the KV store."""

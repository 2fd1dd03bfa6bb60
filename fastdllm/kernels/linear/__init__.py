# SPDX-License-Identifier: Apache-2.0
"""Linear layers with fp8 or int8 weights."""

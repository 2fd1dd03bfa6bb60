# SPDX-License-Identifier: Apache-2.0
"""Top token and its probability, by itself or fused with the language-model head."""

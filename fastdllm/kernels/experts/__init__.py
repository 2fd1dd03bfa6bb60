# SPDX-License-Identifier: Apache-2.0
"""The feed-forward of a mixture of experts."""

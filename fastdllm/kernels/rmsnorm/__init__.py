# SPDX-License-Identifier: Apache-2.0
"""RMS norm with the residual addition before it."""

# SPDX-License-Identifier: Apache-2.0
"""Scoring of generated programs, offline: extraction, confined execution, pass@k."""

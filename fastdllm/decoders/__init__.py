# SPDX-License-Identifier: Apache-2.0
"""One file per decoding rule; the file's name is the name on the command line (see base.py)."""

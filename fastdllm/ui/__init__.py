# SPDX-License-Identifier: Apache-2.0
"""What people touch: the terminal chat, and the command that serves the page. `rich` is optional here."""

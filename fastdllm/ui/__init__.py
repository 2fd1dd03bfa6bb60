# SPDX-License-Identifier: Apache-2.0
"""What people touch: the terminal chat and the web page. `rich` is optional here; only page.py imports `gradio`."""

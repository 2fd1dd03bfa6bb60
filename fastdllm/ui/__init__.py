# SPDX-License-Identifier: Apache-2.0
"""What people touch: the terminal chat and the web page. `rich` is optional here, `gradio` is imported by page.py alone."""

# SPDX-License-Identifier: Apache-2.0
"""An OpenAI-compatible server, batch files and a Ray Serve app, all on one scheduler that many callers share."""

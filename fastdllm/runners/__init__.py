# SPDX-License-Identifier: Apache-2.0
"""How a step is executed; one file a runner, the file's name is the name on the command line."""

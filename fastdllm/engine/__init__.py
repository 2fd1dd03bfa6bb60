# SPDX-License-Identifier: Apache-2.0
"""The decoding engine.

source.py     requests come in, and are withdrawn, between two rounds
admission.py  who waits, who gets a place on the canvas, who leaves
row.py        a request on its way through its blocks
batch.py      which rows share a forward, and its shape
step.py       one forward and what it commits: locate, forward, score, commit
forwards.py   how the network is called: branches, packed passes, layer reuse
shadows.py    query positions that do not see the token they ask about
loop.py       `decode`: the rounds
"""

from fastdllm.engine.admission import check, check_fixed
from fastdllm.engine.loop import Step, decode
from fastdllm.engine.row import NothingCommitted, Request, Result
from fastdllm.engine.source import Listed, Live, Source

__all__ = ["Listed", "Live", "NothingCommitted", "Request", "Result", "Source", "Step", "check", "check_fixed", "decode"]

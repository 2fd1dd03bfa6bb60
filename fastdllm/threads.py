# SPDX-License-Identifier: Apache-2.0
"""How many threads of torch a model on the CPU is worth.

A forward of a small model is many operations of some microseconds. Threads that wait for one another at each of them gain
little on a quiet machine, and on a busy one lose a time slice of the scheduler at each. So a model gets a thread for every
so many parameters, whether it decodes for Python, the chat, the page, the server or an evaluation.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

if TYPE_CHECKING:
    from fastdllm.models import Model

PARAMETERS = 25_000_000  # a thread for each so many; the shipped models have 6 million
MOST = torch.get_num_threads()  # what torch found, or was told, before

_chosen = {MOST}
_parameters: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # of each network, counted once: a run may be short


def threads_for(parameters: int) -> int:
    """At least one, at most what torch would take."""
    return max(1, min(MOST, parameters // PARAMETERS))


def use_threads(model: Model) -> None:
    """Set torch's threads for a model on the CPU, unless OMP_NUM_THREADS or `torch.set_num_threads` has the say."""
    if model.device.type != "cpu" or "OMP_NUM_THREADS" in os.environ:
        return
    if model.network not in _parameters:
        _parameters[model.network] = sum(p.numel() for p in model.network.parameters())
    now, wanted = torch.get_num_threads(), threads_for(_parameters[model.network])
    if now != wanted and now in _chosen:
        _chosen.add(wanted)
        torch.set_num_threads(wanted)

# SPDX-License-Identifier: Apache-2.0
"""Which device this process runs on, and how it exchanges results with the other processes of a launch."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from torch import Tensor

from fastdllm.models import read_device

log = logging.getLogger("lm_eval.fastdllm")  # below lm-eval's, which shows only its own


def choose_device(name: str | None) -> torch.device:
    """The device of that name; the CPU with a warning where lm-eval's default, cuda:0, does not exist.

    ValueError for one that is not here. No device of CUDA is touched: other processes may share it.
    """
    cuda = torch.cuda.is_available()
    if name is None or name == "auto":
        name = "cuda:0" if cuda else "cpu"
    if name in ("cuda", "cuda:0") and not cuda:
        log.warning("no CUDA device: running on the CPU")
        name = "cpu"
    if cuda and name in ("cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))):
        return torch.device(name)
    return read_device(name)


class Distributed:
    """rank, size and device of this process; under `accelerate launch` or torchrun with several processes, one of them."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.rank, self.size = device, 0, 1
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState

            state = PartialState(cpu=device.type == "cpu")
            self.rank, self.size = state.process_index, state.num_processes
            if device.type != "cpu":
                self.device = state.device

    def all_gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes, one after the other; one without a dimension counts as one element."""
        if self.size == 1:
            return tensor
        from accelerate.utils import gather

        return gather(tensor.to(self.device))

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """The objects of all processes by rank on process `dst`, None on the others."""
        if self.size == 1:
            return [obj]
        gathered = [None] * self.size if self.rank == dst else None
        torch.distributed.gather_object(obj, gathered, dst)
        return gathered

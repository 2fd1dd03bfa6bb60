# SPDX-License-Identifier: Apache-2.0
"""Which device this process runs on, and how it exchanges results with the other processes of a launch."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("lm_eval.fastdllm")  # below lm-eval's, which shows only its own


def choose_device(name: str | None) -> torch.device:
    """The device of that name; the CPU with a warning where lm-eval's default, cuda:0, does not exist."""
    if name is None:
        name = "cuda:0" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        if name not in ("cuda", "cuda:0"):
            raise ValueError(f"device={name!r}: torch sees no CUDA device")
        log.warning("no CUDA device: running on the CPU")
        name = "cpu"
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device={name!r} is unknown; allowed are cpu, cuda, cuda:0, ...") from error


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

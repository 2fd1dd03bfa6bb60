# SPDX-License-Identifier: Apache-2.0
"""finetune.py under FSDP without a GPU: accelerate shards only on devices that it counts as such, so a CPU says it is one.

torchrun --standalone --nproc_per_node 2 tests/training/fsdp_on_cpu.py OPTIONS OF finetune.py
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

os.environ |= {
    "ACCELERATE_USE_CPU": "true",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": os.environ.get("FSDP_VERSION", "2"),
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "Qwen2DecoderLayer",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_STATE_DICT_TYPE": os.environ.get("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT"),
    "FSDP_OFFLOAD_PARAMS": "false",
}
plain = PartialState.__init__


def as_a_device(self: PartialState, cpu: bool = False, **kwargs: Any) -> None:
    plain(self, cpu, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_XPU


PartialState.__init__ = as_a_device

if __name__ == "__main__":
    from v2.train_scripts import finetune

    finetune.main(sys.argv[1:])
    assert not torch.distributed.is_initialized(), "a process that ends within its group may wait for the others"

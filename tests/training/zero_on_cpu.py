# SPDX-License-Identifier: Apache-2.0
"""finetune.py under DeepSpeed without a GPU: accelerate trains with plain DDP there, unless it is told of processes only.

torchrun --standalone --nproc_per_node 2 tests/training/zero_on_cpu.py --deepspeed CONFIG OPTIONS OF finetune.py
"""

from __future__ import annotations

import os
import sys
from typing import Any

os.environ |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu"}  # read when DeepSpeed and accelerate are imported

import deepspeed  # noqa: F401 - imports the module below
from accelerate import PartialState
from accelerate.utils import DistributedType

# It would compile C++, and wait for the lock that a killed run left.
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None


def over_gloo(self: PartialState, *args: Any) -> tuple[str, DistributedType]:
    return "gloo", DistributedType.MULTI_CPU


PartialState._prepare_backend = over_gloo

if __name__ == "__main__":
    from v2.train_scripts import finetune

    finetune.main(sys.argv[1:])

# SPDX-License-Identifier: Apache-2.0
"""A Trainer that stops where training has become meaningless: a loss, a gradient or a weight that is no finite number.

One such gradient spoils every weight, and no later step mends them. So the first bad step is the one to name, and nothing of
what follows it may be saved. Each step notes on the device whether its loss and its gradient's norm were finite. The note is
read where the host waits for the device anyway, at logging, evaluating and saving, and every `LOOK` steps for runs that do
none of these: reading it at every step would keep the device waiting.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import Trainer

LOOK = 100  # steps after which the note is read at the latest


class Diverged(FloatingPointError):
    """Training has become meaningless; the message names the step and the last checkpoint from before it."""


class FiniteTrainer(Trainer):
    """Raises `Diverged`, on all processes alike, before anything of the bad step is logged or saved.

    With fp16 a gradient that overflows is usual: its step is left out and the scale lowered. There only the weights count.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scaled = self.args.fp16
        # transformers would show the mean of the losses before in place of one that is not finite, and read each to know.
        self.args.logging_nan_inf_filter &= self.scaled
        self.last_good: str | None = None
        self._seen = self._watched = 0
        self._sound: Tensor | None = None
        self._sound_steps: Tensor | None = None

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """transformers' `train`. Raises `Diverged`."""
        if isinstance(resume_from_checkpoint, str):
            self.last_good = resume_from_checkpoint
        try:
            out = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
            self.check_steps()
            self.check_weights()
        except Diverged:
            self.callback_handler.on_train_end(self.args, self.state, self.control)  # progress bars and logs are closed
            raise
        return out

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, grad_norm: Tensor | float | None, *args: Any, **kwargs: Any) -> None:
        self._watch(tr_loss, grad_norm)
        control = self.control
        due = control.should_log or control.should_save or control.should_evaluate
        if due or self.state.global_step % LOOK == 0:
            self.check_steps()
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.check_steps()
        self.check_weights()
        super()._save_checkpoint(*args, **kwargs)
        self.last_good = str(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")

    def _watch(self, loss: Tensor, norm: Tensor | float | None) -> None:
        """Note whether the step is sound, which it is no more once one before it was not. `loss` is the sum since the last
        logged one, so a bad micro-batch spoils it."""
        if self.scaled or self.state.global_step <= self._seen:  # an epoch's end asks again
            return
        if self._sound is None:
            self._sound = torch.ones((), dtype=torch.bool, device=loss.device)
            self._sound_steps = torch.zeros((), dtype=torch.long, device=loss.device)
        self._sound = self._sound & loss.isfinite()
        if norm is not None:
            local = norm.to_local() if isinstance(norm, DTensor) else torch.as_tensor(norm)
            self._sound = self._sound & local.to(loss.device, non_blocking=True).isfinite()
        self._sound_steps = self._sound_steps + self._sound
        self._seen = self.state.global_step
        self._watched += 1

    def check_steps(self) -> None:
        """Raise `Diverged` where a step since the start was not sound on any process."""
        if self._sound_steps is None:
            return
        sound = int(self.accelerator.gather(self._sound_steps[None]).min())  # sync: at logging and saving only
        if sound < self._watched:
            step = self._seen - self._watched + sound + 1
            raise Diverged(self._told(f"the loss or its gradient is no finite number at step {step}"))

    def check_weights(self) -> None:
        """Raise `Diverged` where a trained weight is not finite on any process. Reads them all once, as saving does."""
        bad = torch.zeros((), dtype=torch.long, device=self.args.device)
        for weight in self.model.parameters():
            if weight.requires_grad:
                own = weight.to_local() if isinstance(weight, DTensor) else weight
                bad += ~own.detach().isfinite().all()
        if int(self.accelerator.gather(bad[None]).max()):  # sync: once a save
            raise Diverged(self._told(f"weights are no finite numbers after step {self.state.global_step}"))

    def _told(self, what: str) -> str:
        last = (
            f"the last checkpoint before it is {self.last_good}" if self.last_good else "no checkpoint was saved before it"
        )
        return f"{what} of {self.state.max_steps}; {last}, and nothing was saved since. A lower learning rate may help"


def train_or_exit(trainer: FiniteTrainer, resume: Path | None, prog: str) -> None:
    """Train. Where training becomes meaningless: one line on stderr, by the first process, and exit code 2 of them all."""
    try:
        trainer.train(resume_from_checkpoint=resume and str(resume))
    except Diverged as error:
        trainer.accelerator.end_training()
        if trainer.is_world_process_zero():
            print(f"{prog}: {error}", file=sys.stderr)
        raise SystemExit(2) from error

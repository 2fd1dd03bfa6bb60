# SPDX-License-Identifier: Apache-2.0
"""The documented evaluation commands with shipped models, as a user types them; and two processes against one.

Run as a script (by torchrun, from the test below) this file evaluates a few documents and writes what came out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastdllm.tasks import TASKS_DIR

pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]


def run(command: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def results(done: subprocess.CompletedProcess[str], folder: Path, model: str) -> dict[str, Any]:
    """The results file of a run; its folder carries the model's name."""
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (folder / model).glob("results_*.json")
    return json.loads(file.read_text())


def test_llada_as_published(tmp_path: Path) -> None:
    published = "gen_length=96,steps=96,block_length=32,use_cache=True,threshold=0.9,show_speed=True"
    options = ["--confirm_run_unsafe_code", "--model", "llada_dist", "--apply_chat_template", "--limit", "2"]
    options += ["--model_args", f"model_path='tiny-llada',{published}", "--output_path", str(tmp_path)]
    done = run([*LAUNCH, "eval_llada.py", "--tasks", "gsm_symbolic", *options], ROOT / "llada")
    found = results(done, tmp_path, "tiny-llada")
    assert found["config"]["settings"]["cache"] == "prefix" and found["config"]["settings"]["threshold"] == 0.9
    assert found["config"]["speed"]["samples"] == 2
    assert "exact_match,strict-match" in found["results"]["gsm_symbolic"]
    assert "tokens per forward" in done.stderr
    assert "no CUDA device: running on the CPU" in done.stderr or "cuda" in found["config"]["model_device"].lower()


@pytest.mark.slow
def test_dream_as_published(tmp_path: Path) -> None:
    published = "max_new_tokens=32,diffusion_steps=32,alg=entropy,use_cache=true,show_speed=True"
    options = ["--batch_size", "1", "--limit", "1", "--output_path", str(tmp_path)]
    command = [*LAUNCH, "eval.py", "--model", "dream", "--model_args", f"pretrained='tiny-dream',{published}"]
    done = run([*command, "--tasks", "gsm_symbolic", *options], ROOT / "dream")
    settings = results(done, tmp_path, "tiny-dream")["config"]["settings"]
    expected = {"gen_length": 32, "steps": 32, "decoder": "quota", "confidence": "entropy", "cache": "prefix"}
    assert {name: settings[name] for name in expected} == expected


@pytest.mark.slow
def test_v2_as_published_from_the_root(tmp_path: Path) -> None:
    options = ["--limit", "1", "--output_path", str(tmp_path), "--gen_kwargs", "max_gen_toks=32"]
    variables = {"MODEL": "tiny-fast-dllm-v2", "TASK": "gsm_symbolic"}
    done = run(["bash", "v2/eval_gsm8k.sh", *options], ROOT, **variables)
    found = results(done, tmp_path, "tiny-fast-dllm-v2")
    assert found["config"]["settings"]["threshold"] == 1 and found["config"]["settings"]["cache"] == "block"
    assert 0 < found["config"]["speed"]["tokens"] <= 32, "gen_kwargs decide the length"


@pytest.mark.slow
def test_a_misspelt_model_argument_ends_the_run_and_is_named() -> None:
    options = ["--model", "llada_dist", "--model_args", "model_path=tiny-llada,treshold=0.9", "--limit", "1"]
    done = run([sys.executable, "-m", "llada.eval_llada", "--tasks", "gsm_symbolic", *options], ROOT)
    assert done.returncode == 2
    assert "unknown option treshold=0.9; did you mean 'threshold'?" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_without_a_network_a_script_names_the_command_that_needs_none() -> None:
    done = run(["bash", "v2/eval_gsm8k.sh", "--limit", "4"], ROOT, HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "MODEL=tiny-fast-dllm-v2 TASK=gsm_symbolic_chat bash v2/eval_gsm8k.sh" in done.stderr.splitlines()[-1]


def test_the_published_v2_settings(tmp_path: Path) -> None:
    stub = tmp_path / "accelerate"
    stub.write_text(f"#!{sys.executable}\nimport os, sys\nprint(os.getcwd(), *sys.argv[1:], flush=True)\n")
    stub.chmod(0o755)
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])

    def calls(*command: str, **variables: str) -> list[str]:
        done = run(["bash", *command], tmp_path, **{**variables, "PATH": path})
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    (line,) = calls(str(ROOT / "v2" / "eval_gsm8k.sh"), "--limit", "10")
    assert line.startswith(f"{ROOT / 'v2'} launch --quiet eval.py --tasks gsm8k --model fast_dllm_v2 --batch_size 1")
    assert "threshold=1,show_speed=True,cot_prompt=True" in line and line.endswith("--limit 10")
    lines = calls(str(ROOT / "v2" / "eval_script.sh"), "--limit", "3", MODEL="elsewhere")
    assert [line.split("--tasks ")[1].split()[0] for line in lines] == [
        "mmlu",
        "gpqa_main_n_shot",
        "gsm8k",
        "minerva_math",
        "ifeval",
    ]
    assert all("model_path=elsewhere," in line and line.endswith("--limit 3") for line in lines)
    assert all("--apply_chat_template --fewshot_as_multiturn true" in line for line in lines)
    assert "--num_fewshot 5" in lines[0] and "likelihood=first_token" in lines[0] and "--batch_size 32" in lines[2]
    wrong = run(["bash", str(ROOT / "v2" / "eval_script.sh")], tmp_path, TASKS="mmlu quick", PATH=path)
    assert wrong.returncode == 2 and "'quick'" in wrong.stderr


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    file = tmp_path / "two.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__, str(file)]
    done = run(command, tmp_path, ACCELERATE_USE_CPU="true", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr[-3000:]
    two, one = json.loads(file.read_text()), json.loads(json.dumps(evaluate_few()))
    assert (one.pop("processes"), two.pop("processes")) == (1, 2)
    assert one == two
    assert len(one["answers"]) == len(one["choices"]) == one["decoded"] == 3, "padding is not decoded"


def evaluate_few() -> dict[str, Any]:
    """Three documents (an odd number: one process pads) of a generation and of a multiple-choice task."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    from fastdllm.evaluation.harness import DiffusionLM

    model = DiffusionLM(pretrained="tiny-llada", device="cpu", batch_size=2, gen_length=48, block_length=16)
    found = lm_eval.simple_evaluate(
        model,
        tasks=["gsm_symbolic", "gsm_symbolic_mc_digit"],
        task_manager=TaskManager(include_path=str(TASKS_DIR), include_defaults=False),
        limit=3,
        bootstrap_iters=0,
        log_samples=True,
    )
    if found is None:  # lm-eval reports on the first process only
        return {}
    samples = {
        task: sorted([s["doc_id"], s["resps"][0][0]] for s in of if s["filter"] in ("strict-match", "none"))
        for task, of in found["samples"].items()
    }
    scores = {task: {k: v for k, v in of.items() if "," in k} for task, of in found["results"].items()}
    return {
        "answers": samples["gsm_symbolic"],
        "choices": [i for i, _ in samples["gsm_symbolic_mc_digit"]],
        "scores": scores,
        "decoded": found["config"]["speed"]["samples"],
        "processes": found["config"]["processes"],
    }


if __name__ == "__main__" and (few := evaluate_few()):
    Path(sys.argv[1]).write_text(json.dumps(few))

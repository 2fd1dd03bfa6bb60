# SPDX-License-Identifier: Apache-2.0
"""The shell scripts that repeat published evaluations: what they run, where, and with whose arguments."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastdllm.config import DecodeConfig
from fastdllm.evaluation.options import decode_options, rename, split

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [f"{package}/eval_{task}.sh" for package in ("llada", "dream") for task in ("gsm8k", "humaneval", "mmlu", "gpqa")]

# Stands for `accelerate`: notes what it was asked to do, and leaves a sample file where lm-eval would.
STUB = """#!{python}
import json, os, pathlib, sys
with open(os.environ["CALLS"], "a") as calls:
    print(json.dumps([os.getcwd(), sys.argv[1:]]), file=calls)
if "SAMPLES" in os.environ:
    folder = pathlib.Path(sys.argv[sys.argv.index("--output_path") + 1])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "samples_humaneval.jsonl").write_text(os.environ["SAMPLES"])
"""


@pytest.fixture
def run(tmp_path: Path):
    stub = tmp_path / "bin" / "accelerate"
    stub.parent.mkdir()
    stub.write_text(STUB.format(python=sys.executable))
    stub.chmod(0o755)
    calls = tmp_path / "calls"

    def run(script: str | Path, *arguments: str, **settings: str) -> tuple[subprocess.CompletedProcess, list]:
        path = os.pathsep.join([str(stub.parent), str(Path(sys.executable).parent), os.environ["PATH"]])
        env = {**os.environ, "PATH": path, "CALLS": str(calls), **settings}
        calls.write_text("")
        command = ["bash", str(ROOT / script), *arguments]  # an absolute path stays itself
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        return done, [json.loads(line) for line in calls.read_text().splitlines()]

    return run


def value(call: list[str], option: str) -> str:
    return call[len(call) - 1 - call[::-1].index(option) + 1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_runs_in_its_own_folder_and_passes_arguments_on(script: str, run) -> None:
    done, calls = run(script, "--limit", "3", "--num_fewshot", "1", MODEL="tiny-model", TASK="some task")
    assert calls, done.stderr
    package = ROOT / script.split("/")[0]
    for cwd, call in calls:
        assert Path(cwd) == package
        assert call[:3] == ["launch", "--quiet", {"llada": "eval_llada.py", "dream": "eval.py"}[package.name]]
        assert value(call, "--model") == {"llada": "llada_dist", "dream": "dream"}[package.name]
        assert "tiny-model" in value(call, "--model_args").split(",")[0]
        assert value(call, "--tasks") == "some task"
        assert (value(call, "--limit"), value(call, "--num_fewshot")) == ("3", "1")


HINTS = {
    path.relative_to(ROOT).as_posix(): found[1]
    for path in sorted(ROOT.glob("*/*.sh"))
    if (found := re.search(r'WITHOUT_A_NETWORK="([^"]+)"', path.read_text(encoding="utf-8")))
}


@pytest.mark.parametrize("hint", sorted(set(HINTS.values())))
def test_what_is_named_for_working_without_a_network_suits_the_shipped_models(hint: str, run) -> None:
    """Their context has no room for five examples, and they were trained on questions in a chat."""
    assignments, script, options = re.fullmatch(r"((?:\w+=\S+ )+)bash (\S+)((?: \S+)*)", hint).groups()
    done, calls = run(script, *options.split(), **dict(pair.split("=") for pair in assignments.split()))
    assert done.returncode == 0 and calls, done.stderr
    for _, call in calls:
        assert "=tiny-" in value(call, "--model_args") and value(call, "--num_fewshot") == "0"
        assert value(call, "--tasks") != "gsm_symbolic_chat" or "--apply_chat_template" in call


@pytest.mark.parametrize("script", sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("*/eval_*.sh")))
def test_every_script_that_needs_the_hub_names_one(script: str) -> None:
    text = (ROOT / script).read_text(encoding="utf-8")
    assert script in HINTS or ("source settings.sh" in text and f"{script.split('/')[0]}/settings.sh" in HINTS)


@pytest.mark.parametrize("package", ["llada", "dream"])
def test_the_five_published_settings(package: str, run) -> None:
    done, calls = run(f"{package}/eval_gsm8k.sh")
    assert done.returncode == 0, done.stderr
    options = [dict(pair.split("=", 1) for pair in value(call, "--model_args").split(",")) for _, call in calls]
    steps = [one.get("steps", one.get("diffusion_steps")) for one in options]
    assert steps == ["256", "256", "8", "8", "8"]
    assert [one.get("threshold") for one in options] == [None, None, "0.9", "0.9", "0.9"]
    assert [one.get("use_cache", "no").lower() for one in options] == ["no", "true", "no", "true", "true"]
    assert [one.get("dual_cache", "no").lower() for one in options] == ["no", "no", "no", "no", "true"]
    assert len({value(call, "--output_path") for _, call in calls}) == 5


def folder_of(call: list[str]) -> list[str]:
    top, *rest = value(call, "--output_path").split("/")
    assert top == "results"
    return rest


@pytest.mark.parametrize("script", [*SCRIPTS, "v2/eval_gsm8k.sh", "v2/eval_script.sh"])
def test_results_of_each_task_and_setting_have_a_folder_of_their_own(script: str, run) -> None:
    done, calls = run(script)
    assert done.returncode == 0, done.stderr
    folders = [folder_of(call) for _, call in calls]
    assert [task for task, _ in folders] == [value(call, "--tasks") for _, call in calls]
    assert len({tuple(folder) for folder in folders}) == len(folders)


@pytest.mark.parametrize("script", SCRIPTS)
def test_another_task_writes_to_another_folder(script: str, run) -> None:
    _, calls = run(script, TASK="other")
    assert calls and all(folder_of(call)[0] == "other" for _, call in calls)


V2_SETTINGS = [
    ({}, ["baseline"], ["1"], [None]),
    ({"THRESHOLD": "1"}, ["baseline"], ["1"], [None]),
    ({"THRESHOLD": "0.8"}, ["parallel"], ["0.8"], [None]),
    ({"SETTINGS": "baseline parallel_sub_block"}, ["baseline", "parallel_sub_block"], ["1", "0.9"], [None, "True"]),
    ({"MODEL_ARGS": "threshold=0.7,reuse_k=2"}, ["custom"], ["0.7"], [None]),
]


@pytest.mark.parametrize(("given", "settings", "thresholds", "caches"), V2_SETTINGS)
def test_settings_of_v2(given: dict[str, str], settings: list, thresholds: list, caches: list, run) -> None:
    done, calls = run("v2/eval_gsm8k.sh", TASK="gsm_symbolic_chat", **given)
    assert done.returncode == 0, done.stderr
    options = [dict(pair.split("=", 1) for pair in value(call, "--model_args").split(",")) for _, call in calls]
    assert [folder_of(call)[1] for _, call in calls] == settings
    assert [one["threshold"] for one in options] == thresholds
    assert [one.get("use_block_cache") for one in options] == caches
    for one in options:
        split(rename(one))


@pytest.mark.parametrize("given", [{"SETTINGS": "baseline quick"}, {"SETTINGS": "parallel", "MODEL_ARGS": "threshold=1"}])
@pytest.mark.parametrize("script", ["v2/eval_gsm8k.sh", "v2/eval_script.sh"])
def test_wrong_settings_of_v2_stop_before_any_run(script: str, given: dict[str, str], run) -> None:
    done, calls = run(script, **given)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "SETTINGS" in done.stderr
    assert calls == []


SETTINGS = [
    ("baseline", "none", "quota"),
    ("prefix", "prefix", "quota"),
    ("parallel", "none", "threshold"),
    ("prefix_parallel", "prefix", "threshold"),
    ("dual_parallel", "dual", "threshold"),
    ("factor", "none", "factor"),
    ("dual_factor", "dual", "factor"),
]
OFFERED = [("llada", *setting) for setting in SETTINGS] + [("dream", *setting) for setting in SETTINGS[:5]]


@pytest.mark.parametrize(("package", "setting", "cache", "decoder"), OFFERED)
def test_settings_mean_what_they_are_called(package: str, setting: str, cache: str, decoder: str, run) -> None:
    _, calls = run(f"{package}/eval_gsm8k.sh", SETTINGS=setting, BLOCK_LENGTH="16")
    given = dict(pair.split("=", 1) for pair in value(calls[0][1], "--model_args").split(","))
    _, given = split(rename(given))
    config = DecodeConfig(**decode_options(given, {"decoder": "quota", "cache": "none"}))
    assert (config.cache, config.decoder, config.block_length) == (cache, decoder, 16)


@pytest.mark.parametrize("package", ["llada", "dream"])
def test_eval_md_names_options_that_exist(package: str) -> None:
    table = (ROOT / package / "eval.md").read_text().partition("| published | here |")[2].partition("\n\n")[0]
    cells = [cell for line in table.splitlines()[1:] for cell in line.split("|")[1:3]]
    options = [option for cell in cells for quoted in re.findall("`([^`]+)`", cell) for option in quoted.split(",")]
    assert len(options) > 15
    for option in options:
        name, _, given = option.partition("=")
        split(rename({"pretrained": "1", name: given or "1"}))


def test_settings_can_be_chosen_and_a_wrong_one_stops_before_any_run(run) -> None:
    _, calls = run("llada/eval_gsm8k.sh", SETTINGS="dual_factor", FACTOR="0.75", GEN_LENGTH="512")
    assert [value(call, "--model_args") for _, call in calls] == [
        "model_path=GSAI-ML/LLaDA-8B-Instruct,gen_length=512,block_length=32,"
        "steps=16,use_cache=True,dual_cache=True,factor=0.75,show_speed=True"
    ]
    for package in ("llada", "dream"):
        done, calls = run(f"{package}/eval_gsm8k.sh", SETTINGS="baseline quick")
        assert done.returncode == 2 and "'quick'" in done.stderr
        assert calls == []


@pytest.mark.parametrize("package", ["llada", "dream"])
def test_humaneval_scores_its_samples_only_with_permission(package: str, run, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(ROOT / package, folder, ignore=shutil.ignore_patterns("results", "__pycache__"))
    doc = {"prompt": "def f():\n", "entry_point": "f", "test": "def check(f):\n    assert f() == 1"}
    settings = {"SETTINGS": "baseline", "SAMPLES": json.dumps({"doc": doc, "resps": [["    return 1"]]})}
    done, calls = run(folder / "eval_humaneval.sh", **settings)
    assert done.returncode == 0, done.stderr
    assert "--predict_only" in calls[0][1]
    assert "to score: python postprocess_code.py" in done.stdout and "pass@1" not in done.stdout
    done, _ = run(folder / "eval_humaneval.sh", ALLOW_CODE_EXECUTION="1", PYTHONPATH=str(ROOT), **settings)
    assert "pass@1 1.0000" in done.stdout, done.stderr

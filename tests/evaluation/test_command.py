# SPDX-License-Identifier: Apache-2.0
"""The evaluation command: one renaming and one task folder, whatever way the options come, and one line for a mistake."""

from __future__ import annotations

import dataclasses
import errno
import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from fastdllm import cli

pytest.importorskip("lm_eval")
from lm_eval._cli import HarnessCLI

from fastdllm.evaluation import ADAPTERS, checks, task_folders, task_manager
from fastdllm.evaluation.command import main
from fastdllm.tasks import TASKS_DIR

EXPECTED = {"pretrained": "tiny-llada", "gen_length": 32, "cache": "none"}


@pytest.fixture(autouse=True)
def arguments_of_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pytest"])


@pytest.fixture
def shipped_tasks_only(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """lm-eval without its own thousands of tasks; the folders that it was told of."""
    import lm_eval.tasks

    folders: list[Any] = []

    class Few(lm_eval.tasks.TaskManager):
        def __init__(self, include_path: Any, **options: Any) -> None:
            folders.append(include_path)
            super().__init__(include_path=include_path, **(options | {"include_defaults": False}))

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Few)
    return folders


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Namespace]:
    """The arguments with which lm-eval would have begun."""
    calls: list[Namespace] = []
    monkeypatch.setattr(HarnessCLI, "execute", lambda self, args: calls.append(args))
    return calls


def config_file(folder: Path, **options: Any) -> str:
    path = folder / "run.yaml"
    path.write_text(json.dumps(options))  # JSON is YAML
    return str(path)


@pytest.mark.parametrize(
    "given",
    [
        ["--model_args", "model_path=tiny-llada,max_new_tokens=32,cache=none"],
        ["--model_args", "model_path=tiny-llada", "max_new_tokens=32", "cache=none"],
        ["--model_args", '{"model_path": "tiny-llada", "max_new_tokens": 32, "cache": "none"}'],
        {"model_args": {"model_path": "tiny-llada", "max_new_tokens": 32, "cache": "none"}},
        {"model_args": "model_path=tiny-llada,max_new_tokens=32,cache=none"},
    ],
)
@pytest.mark.parametrize("name", list(ADAPTERS))
def test_every_way_in_gets_the_same_names_and_tasks(given: Any, name: str, seen: list, tmp_path: Path) -> None:
    elsewhere = str(tmp_path)
    if isinstance(given, dict):
        given = ["--config", config_file(tmp_path, tasks=["gsm_symbolic"], include_path=elsewhere, model=name, **given)]
    else:
        given = ["--tasks", "gsm_symbolic", "--include_path", elsewhere, "--model", name, *given]
    for more in ([], ["--gen_kwargs", "max_new_tokens=16"]):
        assert main(arguments=[*given, *more]) == 0
        args = seen.pop()
        assert args.model == name and args.model_args == EXPECTED
        assert args.include_path == [str(TASKS_DIR), elsewhere]
        assert args.gen_kwargs == ({"gen_length": 16} if more else None)


def test_the_model_is_the_commands_unless_one_is_named(seen: list, tmp_path: Path) -> None:
    file = config_file(tmp_path, tasks=["gsm_symbolic"], model_args={"pretrained": "tiny-llada"})
    for arguments in (["--config", file], [f"--config={file}"], ["run", "-C", file], ["--tasks", "gsm_symbolic"]):
        assert main("llada_dist", arguments=arguments) == 0
        assert seen.pop().model == "llada_dist"
    assert main(arguments=["run", "--tasks", "gsm8k", "--model=hf", "--model_args", "pretrained=gpt2,max_tokens=3"]) == 0
    args = seen.pop()
    assert (args.model, args.model_args) == ("hf", {"pretrained": "gpt2", "max_tokens": 3}), "others keep their names"


def test_the_task_folder_comes_once() -> None:
    assert task_folders(None) == task_folders(str(TASKS_DIR)) == [str(TASKS_DIR)]
    assert task_folders(["a", "b"]) == [str(TASKS_DIR), "a", "b"]


def test_the_shipped_tasks_are_listed(capsys: pytest.CaptureFixture, shipped_tasks_only: list) -> None:
    assert "gsm_symbolic" in task_manager().all_tasks
    assert main(arguments=["ls", "tasks"]) == 0
    assert shipped_tasks_only == [[str(TASKS_DIR)]] * 2 and "gsm_symbolic" in capsys.readouterr().out


@pytest.mark.parametrize("model", ["fastdllm", "llada_dist"])
def test_help_names_this_command_and_its_model(model: str, capsys: pytest.CaptureFixture) -> None:
    assert main(model, "here", []) == main(model, "here", ["--help"]) == 0
    page = capsys.readouterr().out
    assert (
        page.startswith("usage: here --tasks") and f"(default: {model})" in page and all(name in page for name in ADAPTERS)
    )
    with pytest.raises(SystemExit) as stopped:
        main(model, "here", ["run", "--help"])
    page = capsys.readouterr().out
    assert stopped.value.code == 0
    assert f"(default: {model})" in page and "usage: here run" in page and "hf)" not in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "gsm_symbolic", "--model_args", "pretrained=tiny-llada,treshold=0.9"], "did you mean 'threshold'?"),
        (["--tasks", "gsm_symbolic", "--model_args", "pretrained=nowhere"], "'nowhere'"),
        (["--tasks", "gsm_symbolic", "--model_args", "threshold=0.9"], "pretrained (or model_path) is missing"),
        (["--tasks", "gsm_symbolik", "--model_args", "pretrained=tiny-llada"], "Tasks not found: gsm_symbolik"),
        (["--tasks", "gsm_symbolic", "--model", "nosuch"], "nosuch"),
        (
            ["--tasks", "gsm_symbolic", "--model_args", "pretrained=tiny-sudoku", "--samples", '{"gsm_symbolic": [999999]}'],
            "--samples should be in the interval",
        ),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
@pytest.mark.usefixtures("shipped_tasks_only")
def test_a_mistake_is_one_line_and_exit_code_two(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["eval", *arguments]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("fastdllm eval: ") and message in last


@pytest.mark.parametrize("place", ["{folder}/file", "{folder}/file/below", "/dev/full", "/proc/nowhere/results.json"])
@pytest.mark.parametrize("way", ["flag", "file"])
def test_a_place_for_results_that_cannot_be_written_is_told_first(
    place: str, way: str, seen: list, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    """lm-eval would compute everything, and then log that it could not save it."""
    (tmp_path / "file").write_text("")
    place = place.format(folder=tmp_path)
    given = ["--output_path", place] if way == "flag" else ["--config", config_file(tmp_path, output_path=place)]
    assert main(arguments=["--tasks", "gsm_symbolic", "--model_args", "pretrained=tiny-llada", *given]) == 2
    said = capsys.readouterr().err
    assert not seen and len(said.splitlines()) == 1 and f"output_path={place!r}" in said


WRONG = {
    "limit": ["-1", "0", "nan", "inf", "2.5", "x", ""],
    "batch_size": ["0", "-1", "1.5", "many", "auto:", "auto:x"],
    "max_batch_size": ["0", "-1"],
    "num_fewshot": ["-1", "x"],
    "device": ["nope", "cuda:99", "meta", "3"],
    "seed": ["abc", "1,2", "1,-2,3,4", "1,2,99999999999999999999,4", ""],
    "include_path": ["{folder}/nowhere", "{folder}/file"],
    "use_cache": ["{folder}/file/below", "/proc/nowhere", "{folder}/damaged"],
    "samples": [
        "{{x",
        "[1]",
        "nowhere.json",
        '{{"gsm_symbolic": 3}}',
        '{{"gsm_symbolic": [-1]}}',
        "{folder}",
        '{{"gsm_symbolic": []}}',
    ],
    "verbosity": ["loud"],
    "wandb_args": ["project=x"],
    "trackio_args": ["project=x"],
    "hf_hub_log_args": ["nowhere=1", "output=x"],
}


@pytest.mark.parametrize(("option", "value"), [(option, value) for option, values in WRONG.items() for value in values])
@pytest.mark.parametrize("way", ["flag", "file"])
def test_a_value_that_makes_no_sense_is_one_line_before_lm_eval_begins(
    option: str,
    value: str,
    way: str,
    seen: list,
    capsys: pytest.CaptureFixture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "damaged_rank0.db").write_text("no database")
    monkeypatch.setattr(checks, "find_spec", lambda library: None)  # libraries that a machine may have
    value = value.format(folder=tmp_path)
    flag = [f"--{option}={value}"] if value else [f"--{option}", value]
    given = flag if way == "flag" else ["--config", config_file(tmp_path, **{option: value})]
    code = main(arguments=["--tasks", "gsm_symbolic", "--model_args", "pretrained=tiny-llada", *given])
    said = capsys.readouterr().err
    assert code == 2 and not seen, said
    assert len(said.splitlines()) == 1 and said.startswith("fastdllm eval: ") and option in said
    assert "functools" not in said and "try_parse" not in said


@pytest.mark.parametrize(
    "options",
    [
        {"tasks": 3},
        {"tasks": {"a": 1}},
        {"output_path": 3},
        {"use_cache": True},
        {"limit": True},
        {"limit": [1]},
        {"device": 0},
        {"model_args": [1]},
        {"log_samples": "yes"},
        {"verbosity": 1},
        {"seed": [0, -1, 0, 0]},
        {"include_path": ["nowhere"]},
        {"include_path": 3},
        {"include_path": [None]},
        {"tasks": [1]},
        {"tasks": [["gsm_symbolic"]]},
        {"tasks": []},
        {"tasks": ""},
        {"model": ["fastdllm"]},
        {"model": {"a": None}},
        {"cache_requests": "true"},
        {"hf_hub_log_args": {"a": None}},
    ],
)
def test_a_value_of_another_type_in_a_config_file_is_one_line(
    options: dict, seen: list, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    given = {"tasks": ["gsm_symbolic"], "model_args": "pretrained=tiny-llada", **options}
    assert main(arguments=["--config", config_file(tmp_path, **given)]) == 2
    said = capsys.readouterr().err
    assert not seen and len(said.splitlines()) == 1 and next(iter(options)) in said


@pytest.mark.parametrize("samples", ['{"gsm_symbolc": [1]}', {"gsm_symbolic": [0], "other": [1]}])
def test_questions_of_a_task_that_does_not_run_are_told(samples: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """lm-eval would ask all questions of the others."""
    given = ["--samples", samples] if isinstance(samples, str) else ["--config", config_file(tmp_path, samples=samples)]
    assert main(arguments=["--tasks", "gsm_symbolic", "--model_args", "pretrained=tiny-llada", *given]) == 2
    assert "is no task that runs; those are gsm_symbolic" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("limit: 1\nlimit: 2", "2: 'limit' is there twice"),
        ("model_args:\n  pretrained: tiny-llada\n  pretrained: tiny-dream", "3: 'pretrained' is there twice"),
        ("metadata: [{a: 1, a: 2}]", "'a' is there twice"),
        ("metadata: &a {b: *a}", "nested too deep"),
        ("metadata: " + "[" * 5000 + "]" * 5000, "nested too deep"),
        ("model_args: {1: 2}", "model_args: 1 is no name"),
        ("model_args: {null: 2}", "model_args: None is no name"),
    ],
)
def test_a_config_file_that_says_two_things_or_nothing_that_ends_is_one_line(
    text: str, word: str, seen: list, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text(text)
    arguments = ["--tasks", "gsm_symbolic", "--config", str(tmp_path / "run.yaml")]
    assert main(arguments=arguments) == 2
    said = capsys.readouterr().err
    assert not seen and len(said.splitlines()) == 1 and word in said


@pytest.mark.usefixtures("shipped_tasks_only")
def test_what_is_null_in_a_config_file_is_not_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """To lm-eval either, which takes null for the value where it has a default of its own."""
    import lm_eval
    from lm_eval.config.evaluate_config import EvaluatorConfig

    runs: list[dict[str, Any]] = []
    monkeypatch.setattr(lm_eval, "simple_evaluate", lambda **options: runs.append(options))
    given = {"tasks": ["gsm_symbolic"], "model_args": {"pretrained": "tiny-llada"}}
    nulls = [field.name for field in dataclasses.fields(EvaluatorConfig) if field.name not in {*given, "seed"}]
    for null in ([], *([name] for name in nulls), nulls):
        path = config_file(tmp_path, **given, **dict.fromkeys(null))
        assert main(arguments=["--config", path]) == 0, null
        for name in ("task_manager", "evaluation_tracker"):
            runs[-1].pop(name)
        assert runs[-1] == runs[0], null


@pytest.mark.parametrize(
    "given",
    [
        *(["--limit", value] for value in ("1", "0.25", "1.0", "1e3")),
        *(["--batch_size", value] for value in ("4", "auto", "auto:4")),
        *(["--seed", value] for value in ("3", "None", "0,None,8,52", "1,2,3,-4")),
        *(["--device", value] for value in ("cpu", "auto", "cuda:0")),
        ["--num_fewshot", "0"],
        ["--verbosity", "debug"],
        ["--samples", '{"gsm_symbolic": [0, 3]}'],
        ["--use_cache", "answers"],
        ["--model", "hf", "--device", "mps:0", "--batch_size", "1"],
    ],
)
def test_what_lm_eval_allows_is_kept(given: list[str], seen: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments=["--tasks", "gsm_symbolic", "--model_args", "pretrained=tiny-llada", *given]) == 0
    assert len(seen) == 1 and not list(tmp_path.iterdir())


@pytest.mark.usefixtures("shipped_tasks_only")
@pytest.mark.parametrize(
    ("lost", "level"), [(("aggregated",), "ERROR"), (("sample",), "INFO"), (("aggregated", "sample"), "INFO")]
)
def test_results_that_are_lost_are_told_at_the_end(
    lost: tuple[str, ...], level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """lm-eval logs that it could not write them, and ends with exit code 0."""
    from lm_eval.loggers import evaluation_tracker

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv("LMEVAL_LOG_LEVEL", level)
    arguments = ["--tasks", "gsm_symbolic", "--limit", "1", "--device", "cpu", "--model_args"]
    arguments += ["pretrained=tiny-sudoku,gen_length=8", "--log_samples", "--output_path", str(tmp_path)]
    for wrong in (lost, ()):
        with monkeypatch.context() as disk:
            if "aggregated" in wrong:
                disk.setattr(Path, "write_text", full)
            if "sample" in wrong:
                disk.setattr(evaluation_tracker, "sanitize_list", full)  # which it calls on each line that it writes
            assert main(arguments=arguments) == (2 if wrong else 0)
        told = capsys.readouterr()
        kinds = {path.name.partition("_")[0] for path in tmp_path.rglob("*") if path.is_file()}
        names = {"aggregated": "results", "sample": "samples"}
        assert kinds == {kind for name, kind in names.items() if name not in wrong}, "nothing torn is left"
        lines = [line for line in told.err.splitlines() if line.startswith("fastdllm eval: ")]
        assert "|gsm_symbolic" in told.out, "the scores are told all the same"
        assert len(lines) == bool(wrong)
        for line in lines:
            assert "results were lost: " in line and line.count("No space left") == len(wrong)
            assert all(f"Could not save {name}" in line.replace("results aggregated", "aggregated") for name in wrong)


@pytest.mark.parametrize("value", ["none", "None", "3", "'x'"])
def test_an_unknown_name_in_the_models_arguments_is_named_whatever_its_value(
    value: str, seen: list, capsys: pytest.CaptureFixture
) -> None:
    assert main(arguments=["--tasks", "gsm_symbolic", "--model_args", f"pretrained=tiny-llada,cahce={value}"]) == 2
    assert not seen and "did you mean 'cache'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--wibble", "3"], "--wibble"),
        (["--tasks", "gsm_symbolic", "--limit", "x"], "--limit"),
        (["--tasks", "gsm_symbolic", "--num_fewshot"], "--num_fewshot"),
        (["--tasks", "gsm_symbolic", "--model_args", "{x"], "Invalid JSON"),
        (["wobble"], "wobble"),
    ],
)
def test_what_argparse_refuses_is_one_line_too(arguments: list[str], word: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["eval", *arguments]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("fastdllm eval: ") and word in said[0]


@pytest.mark.usefixtures("shipped_tasks_only")
def test_a_task_that_cannot_be_honoured_is_left_out_and_the_others_run(tmp_path: Path, capsys: Any) -> None:
    documents = tmp_path / "documents.json"
    documents.write_text(json.dumps([{"q": "far away", "a": "x"}]))
    for name, length in (("zz_good", 8), ("zz_long", 32768)):
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(documents)}},
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": "{{q}}",
            "doc_to_target": "{{a}}",
            "generation_kwargs": {"max_gen_toks": length, "until": []},
            "metric_list": [{"metric": "exact_match"}],
        }
        (tmp_path / f"{name}.yaml").write_text(json.dumps(task))
    arguments = ["--include_path", str(tmp_path), "--model_args", "pretrained=tiny-llada", "--device", "cpu"]
    assert main(arguments=["--tasks", "zz_good,zz_long", *arguments]) == 2
    told = capsys.readouterr()
    assert "|zz_good" in told.out and "|zz_long" not in told.out
    assert "task zz_long was left out: gen_length=32768 leaves no room" in told.err.splitlines()[-1]
    assert main(arguments=["--tasks", "zz_long", *arguments]) == 2
    assert "task zz_long: gen_length=32768" in capsys.readouterr().err.splitlines()[-1]
    assert main(arguments=["--tasks", "zz_long", *arguments, "--gen_kwargs", "max_new_tokens=8"]) == 0


def test_lm_evals_own_tasks_are_read_only_where_one_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Thousands of files, which take longer than a short evaluation."""
    from lm_eval.tasks._index import TaskIndex

    read: list[list[str]] = []
    build = TaskIndex.build

    def recording(paths: Any, **options: Any) -> Any:
        read.append([str(path) for path in paths])
        return build([path for path in paths if str(path) in (str(TASKS_DIR), str(tmp_path))], **options)

    monkeypatch.setattr(TaskIndex, "build", staticmethod(recording))
    arguments = ["--model_args", "pretrained=tiny-sudoku,gen_length=8", "--include_path", str(tmp_path), "--device", "cpu"]
    folders = [str(TASKS_DIR), str(tmp_path)]
    assert main(arguments=["--tasks", "gsm_symbolic,gsm_symbolic_chat", "--limit", "1", *arguments]) == 0
    assert read == [folders]
    for unknown in ("gsm8k", "gsm_symbolic,gsm8k", "gsm_sym*"):
        read.clear()
        main(arguments=["--tasks", unknown, "--limit", "1", *arguments])
        assert [set(folders) < set(paths) for paths in read] == [False, True], unknown


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle: dream", "unknown option 'modle'; did you mean 'model'?"),
        ("[1]", "must be a mapping"),
        ("a: [", "Invalid YAML"),
    ],
)
def test_a_bad_config_file_is_named(text: str, message: str, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert main(arguments=["--config", str(file)]) == 2
    error = capsys.readouterr().err
    assert message in error and "run.yaml" in error and len(error.splitlines()) == 1


def test_without_a_network_the_way_out_is_told(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(self: HarnessCLI, args: Namespace) -> None:
        raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr(HarnessCLI, "execute", unreachable)
    assert main(arguments=["--tasks", "gsm8k", "--model_args", "pretrained=tiny-llada"]) == 2
    error = capsys.readouterr().err
    assert "openai/gsm8k" in error and "--tasks gsm_symbolic" in error

# SPDX-License-Identifier: Apache-2.0
"""The page about serving, followed literally: every curl line and every block of Python."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serving.conftest import ROOT

PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
SHELL = "\n".join(re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
CURL = re.findall(r"^curl .*?(?:\n\}'$|$(?!\n  ))", SHELL, re.MULTILINE | re.DOTALL)
PYTHON = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
ADDRESS = "http://127.0.0.1:8000"


def test_the_page_has_lines_for_every_endpoint() -> None:
    assert all(ADDRESS in line for line in CURL)
    for path in ("/health", "/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/decide"):
        assert any(f"{path} " in f"{line} " for line in CURL), path


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize("line", CURL, ids=range(len(CURL)))
def test_a_line_of_the_page_gets_an_answer(server: str, line: str) -> None:
    done = subprocess.run(["bash", "-c", line.replace(ADDRESS, server)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    if "-sN" in line:
        events = [json.loads(event[6:]) for event in done.stdout.splitlines() if event.startswith("data: {")]
        assert done.stdout.endswith("data: [DONE]\n\n") and "usage" in events[-1]
        fields = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", PAGE.split("field `denoising`")[1].split("###")[0], re.MULTILINE)
        documented = {name for cell in fields for name in re.findall(r"`(\w+)`", cell)}
        denoising = next(event["denoising"] for event in events if "denoising" in event)
        assert documented == set(denoising)
    else:
        answer = json.loads(done.stdout)
        assert "error" not in answer, answer


@pytest.mark.parametrize("block", PYTHON, ids=range(len(PYTHON)))
def test_a_block_of_the_page_runs(server: str, block: str, tmp_path: Path) -> None:
    pytest.importorskip("openai")
    code = block.replace(ADDRESS, server)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()


def test_options_named_on_the_page_exist() -> None:
    from fastdllm.serving.command import parser

    known = {option for action in parser()._actions for option in action.option_strings}
    named = set(re.findall(r"`(--[\w-]+)", PAGE.split("## Requests")[0]))
    assert named and not named - known


def test_the_model_is_named_as_for_the_other_commands_too() -> None:
    from fastdllm.serving.command import parser, settings

    def named(*arguments: str) -> str:
        return settings(parser().parse_args(arguments)).model

    assert named("tiny-dream") == named("--model", "tiny-dream", "--port", "0") == "tiny-dream" and named() == "tiny-llada"
    with pytest.raises(ValueError, match="--model tiny-dream and MODEL tiny-llada are the same option"):
        named("tiny-llada", "--model", "tiny-dream")

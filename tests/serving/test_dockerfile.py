# SPDX-License-Identifier: Apache-2.0
"""The Dockerfile, as far as it can be checked without building it: what it names exists, and its commands run here."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys

import pytest

from fastdllm.serving.command import parser
from tests.serving.conftest import ROOT, free_port

TEXT = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
INSTRUCTIONS = [tuple(line.split(None, 1)) for line in re.sub(r"\\\n", " ", TEXT).splitlines() if line.strip()]
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8").partition("## In a container")[2].partition("\n## ")[0]
COMMANDS = re.sub(r"\\\n", " ", "".join(re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))).splitlines()
ARGUMENTS = dict(value.partition("=")[::2] for name, value in INSTRUCTIONS if name == "ARG")


def of(name: str) -> list[str]:
    """What follows each instruction of that name."""
    return [value for found, value in INSTRUCTIONS if found == name]


def words(command: str) -> list[str]:
    return shlex.split(command, comments=True)


def build_arguments(command: str) -> list[tuple[str, str]]:
    given = words(command)
    return [tuple(given[i + 1].split("=", 1)) for i, word in enumerate(given) if word == "--build-arg"]


def health_check(port: str) -> subprocess.CompletedProcess:
    (check,) = of("HEALTHCHECK")
    command = json.loads(check.partition("CMD ")[2])
    assert command[0] == "python"
    code = [part.replace(":8000/", f":{port}/") for part in command[1:]]
    return subprocess.run([sys.executable, *code], capture_output=True, timeout=600)


def test_what_is_copied_exists_and_is_not_ignored() -> None:
    sent = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    sources = [source for line in of("COPY") for source in line.split()[:-1]]
    assert {"fastdllm", "pyproject.toml"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(f"{source}/".startswith(f"{path}/") for path in sent), source
    assert all(any(f"{source}/".startswith(f"{path}/") for source in sources) for path in sent), "sent, but not copied"


def test_the_environment_can_be_made_from_what_is_there_by_then() -> None:
    """The script, the pins and all files that the package's metadata name are copied before the step that installs."""
    install = next(i for i, (name, value) in enumerate(INSTRUCTIONS) if name == "RUN" and "setup_env.sh" in value)
    there = {source for name, value in INSTRUCTIONS[:install] if name == "COPY" for source in value.split()[:-1]}
    project = (ROOT / "pyproject.toml").read_text()
    named = [
        *re.findall(r'^readme = "(.+)"', project, re.MULTILINE),
        *re.findall(r'^license-files = \["(.+)"\]', project, re.MULTILINE),
    ]
    assert {"pyproject.toml", "requirements.txt", "scripts/setup_env.sh", "fastdllm/__init__.py", *named} <= there
    assert 'version = { attr = "fastdllm.__version__" }' in project


def test_extras_are_those_of_the_project() -> None:
    section = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    known = set(re.findall(r"^([\w-]+) = \[", section, re.MULTILINE))
    asked = [value for command in COMMANDS for name, value in build_arguments(command) if name == "EXTRAS"]
    for extras in (ARGUMENTS["EXTRAS"], *asked):
        assert "serve" in extras.split(",") and set(extras.split(",")) <= known


@pytest.mark.parametrize("step", of("RUN"))
def test_steps_are_shell(step: str) -> None:
    done = subprocess.run(["sh", "-n", "-c", step], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_server_is_no_root_and_its_options_parse() -> None:
    names = [name for name, _ in INSTRUCTIONS]
    assert of("USER")[-1] not in ("root", "0") and names.index("USER") < names.index("ENTRYPOINT")
    assert f" {of('USER')[-1]}" in next(step for step in of("RUN") if "useradd" in step)
    entry, command = json.loads(of("ENTRYPOINT")[0]), json.loads(of("CMD")[0])
    assert entry[:2] == ["fastdllm", "serve"]
    given = parser().parse_args([*entry[2:], *command])
    assert (given.host, str(given.port)) == ("0.0.0.0", of("EXPOSE")[0])
    assert (ROOT / "fastdllm" / "tiny" / given.model).is_dir()


def test_the_health_check_knows_a_server_from_none(server: str) -> None:
    assert health_check(server.rpartition(":")[2]).returncode == 0
    assert health_check(str(free_port())).returncode != 0


def test_commands_of_the_page_fit_the_dockerfile() -> None:
    assert sum(command.startswith("docker build") for command in COMMANDS) >= 2
    images = [words(command)[words(command).index("-t") + 1] for command in COMMANDS if command.startswith("docker build")]
    entry = json.loads(of("ENTRYPOINT")[0])
    for command in COMMANDS:
        assert all(name in ARGUMENTS for name, _ in build_arguments(command))
        if command.startswith("docker run"):
            given = words(command)
            image = next(i for i, word in enumerate(given) if word in images)
            parser().parse_args([*entry[2:], *given[image + 1 :]])
            assert f"8000:{of('EXPOSE')[0]}" in given

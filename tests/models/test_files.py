# SPDX-License-Identifier: Apache-2.0
"""Damage of every kind to any file of a checkpoint folder, and entries that are no files.

Each case stands for its class; what all of them share is that the error is a ValueError or an OSError that names the file.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import fastdllm
from tests.models.checkpoint_folder import KINDS, load
from tests.published_checkpoints import (
    ADDED,
    special_ids,
    write_checkpoint,
)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer_config.json", "added_tokens.json", "vocab.json", "model.safetensors"]
)
@pytest.mark.parametrize("kind", ["pipe", "device", "link to nothing", "link to itself"])
def test_an_entry_that_is_no_file_is_named_and_never_waited_for(tmp_path: Path, name: str, kind: str) -> None:
    """A pipe would be waited for without end, /dev/zero read without end, and a link to nothing passed over."""
    write_checkpoint(tmp_path, "dream")
    path = tmp_path / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to({"device": "/dev/zero", "link to nothing": "nowhere", "link to itself": name}[kind])
    with pytest.raises((ValueError, OSError), match=name.replace(".", r"\.")):
        load(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "added_tokens.json", "vocab.json"])
def test_a_name_with_two_values_is_refused(tmp_path: Path, name: str) -> None:
    """Readers of JSON differ in which of the two counts; the same value twice is no matter."""
    write_checkpoint(tmp_path, "dream")
    path = tmp_path / name
    text = path.read_text(encoding="utf-8")
    first, value = next(iter(json.loads(text).items()))
    path.write_text(f"{text[:-1]}, {json.dumps(first)}: {json.dumps(value)}}}", encoding="utf-8")
    load(tmp_path)
    path.write_text(f"{text[:-1]}, {json.dumps(first)}: 77}}", encoding="utf-8")
    with pytest.raises(ValueError, match=f"{name} is not valid JSON .the name {first!r} is there twice"):
        load(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"decoders": {"x": {"drafts": [[-1]], "forwards": []}}}',
        '{"decoders": {"x": {"drafts": [[1e999]], "forwards": []}}}',
        "[1]",
        '{"decoders": {}, "decoders": {"x": {"drafts": [], "forwards": []}}}',
        "version https://git-lfs.github.com/spec/v1\noid sha256:46\nsize 12\n",
    ],
)
def test_a_damaged_file_of_drafts_is_named(tmp_path: Path, text: str) -> None:
    write_checkpoint(tmp_path, "llada")
    (tmp_path / "drafts.json").write_text(text)
    with pytest.raises(ValueError, match=r"drafts\.json.*git lfs pull" if "git-lfs" in text else r"drafts\.json"):
        load(tmp_path)


def test_a_clone_without_git_lfs_says_so(tmp_path: Path) -> None:
    for kind in KINDS:
        write_checkpoint(tmp_path / kind, kind)
        for path in sorted((tmp_path / kind).iterdir()):
            if path.name == "special_tokens_map.json" and kind == "llada":
                continue
            whole = path.read_bytes()
            path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
            with pytest.raises(ValueError, match=f"{path.name}: a git-lfs pointer .*git lfs pull"):
                load(tmp_path / kind)
            path.write_bytes(whole)


NAMED = ["tokenizer_config", "added_tokens", "special_tokens_map"]


READ = {
    "llada": ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"],
    "dream": [
        "config.json",
        "vocab.json",
        "merges.txt",
        "tokenizer_config.json",
        "added_tokens.json",
        "special_tokens_map.json",
    ],
}


BROKEN = {
    "empty": b"",
    "null": b"null",
    "list": b"[1]",
    "number": b"5",
    "text": b'"x"',
    "torn": b'{"a": ',
    "not utf-8": b'{"\xff": 1}',
    "deep": b"[" * 100_000,
    "deep object": b'{"a":' * 100_000,
    "digits": b'{"a": ' + b"1" * 10_000 + b"}",
    "binary": bytes(range(256)),
}


@pytest.mark.parametrize("kind, name", [(k, n) for k, names in READ.items() for n in names])
@pytest.mark.parametrize("how", [*BROKEN, "folder"])
def test_a_broken_file_is_named(tmp_path: Path, kind: str, name: str, how: str) -> None:
    write_checkpoint(tmp_path, kind, shards=2 if kind == "llada" else 1)
    path = tmp_path / name
    path.unlink()
    if how == "folder":
        path.mkdir()
    else:
        path.write_bytes(BROKEN[how])
    if (name, how) == ("merges.txt", "empty"):
        load(tmp_path)  # a vocabulary without merges is one
        return
    with pytest.raises((ValueError, OSError), match=name):
        load(tmp_path)


def damaged(value: Any, draw: random.Random) -> Any:
    """The same JSON value with one thing changed, somewhere inside."""
    junk = [None, 0, -1, 10**30, 1.5, float("nan"), float("inf"), "", "x", [], [1], {}, {"a": 1}, True, False, "\ud800"]
    if isinstance(value, dict) and value and draw.random() < 0.9:
        key = draw.choice(sorted(value, key=str))
        change = draw.choice(["inside", "inside", "inside", "gone", "renamed"])
        rest = {k: v for k, v in value.items() if k != key}
        if change == "gone":
            return rest
        return {
            **rest,
            (f"{key}x" if change == "renamed" else key): value[key] if change == "renamed" else damaged(value[key], draw),
        }
    if isinstance(value, list) and value and draw.random() < 0.9:
        at = draw.randrange(len(value))
        return [*value[:at], damaged(value[at], draw), *value[at + 1 :]]
    return draw.choice(junk)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {kind: tmp_path_factory.mktemp("whole") / kind for kind in KINDS}
    for kind, folder in folders.items():
        write_checkpoint(folder, kind, shards=2 if kind == "v2" else 1)
    return folders


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(40))
def test_random_damage_is_an_error_that_names_the_file_or_changes_nothing(
    tmp_path: Path, whole: dict[str, Path], kind: str, seed: int
) -> None:
    """One byte, one cut or one JSON value, in any file: refused with a name, or the model of the whole folder."""
    draw = random.Random(seed)
    folder = tmp_path / "m"
    shutil.copytree(whole[kind], folder)
    path = folder / draw.choice(sorted(p.name for p in folder.iterdir()))
    content = path.read_bytes()
    how = draw.choice(["value", "value", "cut", "bytes"] if path.suffix == ".json" else ["cut", "bytes"])
    if how == "value":
        path.write_text(json.dumps(damaged(json.loads(content), draw)), encoding="utf-8")
    elif how == "cut":
        path.write_bytes(content[: draw.randrange(len(content))])
    else:
        at = draw.randrange(min(len(content), 4000))
        path.write_bytes(content[:at] + bytes(draw.randrange(256) for _ in range(3)) + content[at + 3 :])
    try:
        model = load(folder)
    except (ValueError, OSError) as error:
        assert str(folder) in str(error) or path.name in str(error), error
        return
    good = load(whole[kind])
    assert model.spec.mask_id == good.spec.mask_id
    assert model.network.embed.weight.shape == good.network.embed.weight.shape
    for text in ADDED[kind]:
        i = model.tokenizer.get_vocab().get(text) if model.tokenizer else None
        assert i in (None, special_ids(kind)[text])
    # What still loads must still run.
    out = fastdllm.generate(model, [torch.tensor([5, 6, 7])], gen_length=8, block_length=8)
    assert len(out.sequences[0]) <= 11


def test_a_link_out_of_the_folder_is_how_the_hub_stores_files(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "blobs", "llada")
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        os.symlink(path, tmp_path / "snapshot" / path.name)
    load(tmp_path / "snapshot")

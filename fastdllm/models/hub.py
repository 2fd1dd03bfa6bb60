# SPDX-License-Identifier: Apache-2.0
"""From a name to the folder that holds a checkpoint: shipped, local, or downloaded from the Hugging Face hub."""

from __future__ import annotations

import textwrap
import warnings
from pathlib import Path

from fastdllm.fields import shown
from fastdllm.models.files import present, read_object

TINY = Path(__file__).parent.parent / "tiny"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ["*.json", "adapter_model.safetensors", "merges.txt", "*.jinja"]
PUBLISHED_FILES = ["*.json", "*.safetensors", "merges.txt", "*.jinja"]
PATH = 300  # characters of a name in a message: a path must be whole


def tiny_names() -> list[str]:
    """The checkpoints that ship with the package."""
    return sorted(p.parent.name for p in TINY.glob("*/config.json"))


def find_folder(name: str, revision: str | None = None) -> Path:
    """A shipped name, a local folder or a hub id -> the folder that holds the checkpoint.

    Raises FileNotFoundError, in one line, for a name that is none of these, an id that the hub does not have, and a hub that
    cannot be reached.
    """
    if not isinstance(name, str | Path):
        raise ValueError(f"model {shown(name)} must be a shipped name, a folder or a hub id 'owner/name'")
    name = str(name)
    path = TINY / name if name in tiny_names() else Path(name).expanduser()
    if name and _is_folder(path):  # an empty one, as of a variable that is not set, would be the present folder
        if revision is not None:
            warnings.warn(f"revision={shown(revision)} has no effect: {name!r} does not come from the hub", stacklevel=3)
        return _check_folder(name, path)
    shipped = ", ".join(tiny_names())
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or "\0" in name:
        raise FileNotFoundError(
            f"model {shown(name, PATH)} is neither a folder nor a shipped name ({shipped}) nor a hub id 'owner/name'"
        )
    return _check_folder(name, _download(name, revision, f"a folder, or a shipped name ({shipped}), works offline"))


def find_adapter(name: str) -> Path:
    """A local folder or a hub id -> the folder that holds a LoRA adapter. Raises FileNotFoundError as `find_folder` does."""
    if not isinstance(name, str | Path):
        raise ValueError(f"adapter={shown(name)} must be a folder or a hub id 'owner/name'")
    path = Path(name).expanduser()
    if not (str(name) and _is_folder(path)):
        if str(name).count("/") != 1 or str(name).startswith((".", "/", "~")) or "\0" in str(name):
            raise FileNotFoundError(f"adapter={shown(str(name), PATH)} is neither a folder nor a hub id 'owner/name'")
        path = _download(str(name), None, "a folder works offline", ADAPTER_FILES, "adapter")
    if not (path / ADAPTER_CONFIG).exists():
        raise FileNotFoundError(f"adapter={str(name)!r}: the folder has no adapter_config.json")
    return path


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # a name too long for any file, or with NUL in it
        return False


def _check_folder(name: str, path: Path) -> Path:
    if (path / ADAPTER_CONFIG).exists() and not any(not p.name.startswith("adapter_") for p in path.glob("*.safetensors")):
        base = read_object(path / ADAPTER_CONFIG).get("base_model_name_or_path")
        raise FileNotFoundError(
            f"model {name!r}: the folder holds a LoRA adapter, not a model; "
            f"load its base model ({base}) with adapter={name!r}"
        )
    if present(path / "config.json"):
        return path
    raise FileNotFoundError(f"model {name!r}: the folder has no config.json")


def _download(
    name: str, revision: str | None, offline: str = "", files: list[str] = PUBLISHED_FILES, what: str = "model"
) -> Path:
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
    except ImportError as error:
        raise ImportError(f"{what} {name!r} looks like a hub id; `pip install huggingface_hub` to download it") from error
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=files))
    except GatedRepoError:
        reason = "needs an accepted licence and a token (`hf auth login`)"
    except RepositoryNotFoundError:
        reason = f"is not on the hub, or is private; {offline}"
    except RevisionNotFoundError:
        reason = f"has no revision {revision!r} on the hub"
    except HFValidationError as error:
        reason = f"is no hub id ({str(error).splitlines()[0]}); {offline}"
    except (OSError, ValueError, RuntimeError) as error:
        # Not reached, not in the cache, cut off: whatever library of the client says so, its first line is the reason.
        reason = f"is not on this machine and could not be fetched from the hub ({_first_line(error)}); {offline}"
    raise FileNotFoundError(f"{what} {name!r} {reason}".rstrip("; "))


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return textwrap.shorten(lines[0], 300, placeholder=" ...") if lines else type(error).__name__

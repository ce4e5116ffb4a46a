"""Files of weights, ours and foreign: read safely, written atomically, checked by name and shape, hashed."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.io.atomic import replacing, sync

SHOWN = 3
"""Names of each kind that a message lists."""
LFS_POINTER = b"version https://git-lfs"
"""Prefix of a Git LFS pointer."""
FIRST = 512
"""Bytes that distinguish weights from a pointer or a web page."""
WEB_PAGE = (b"<!doctype html", b"<html", b"<?xml", b"<!--")
"""Prefixes of web pages."""


def stand_in(first: bytes) -> str | None:
    """Name a Git LFS pointer or a web page by its first bytes, with advice; None for other files."""
    text = first.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(LFS_POINTER):
        return "a Git LFS pointer, not the file itself: run 'git lfs pull' where it lies"
    return "a web page, not the file itself: download the raw file" if text.startswith(WEB_PAGE) else None


def recognise(path: str | os.PathLike[str], name: str) -> str:
    """Return the format of a file by its first bytes: "safetensors", "zip" (torch.save), "pickle" or "other".

    Args:
        path: The file.
        name: What messages call it, e.g. "weights 'x.ckpt'".

    Raises:
        ValueError: If it is no file of its kind but stands for one: a Git LFS pointer, a web page, nothing.
    """
    with Path(path).open("rb") as file:
        first = file.read(FIRST)
    if not first:
        raise ValueError(f"{name} cannot be read: the file is empty")
    if found := stand_in(first):
        raise ValueError(f"{name}: {found}")
    if first[8:9] == b"{":
        return "safetensors"
    return "zip" if first.startswith(b"PK\x03\x04") else "pickle" if first.startswith(b"\x80") else "other"


def read_weights(path: str | Path, parts: Sequence[str] = ()) -> dict[str, Tensor]:
    """Read named tensors from safetensors, or from a pickle of torch's without running what is in it.

    Old checkpoints of Lightning also hold objects of its callbacks. They become inert stand-ins:
    nothing is imported, nothing of the file is called.

    Args:
        path: The file, recognised by its contents. Tensors are taken from its ``state_dict`` or the only dict
            in it that has some; numbers and strings beside them are left out.
        parts: Names of dicts to take, if the file has one of them: the first that it has.

    Returns:
        Tensors on the CPU in the file's dtype, mapped into memory rather than read where that can be.

    Raises:
        FileNotFoundError: If there is no file.
        ValueError: If it is damaged, holds no mapping of tensors, or is something else (TorchScript, ...).
    """
    path = Path(path)
    if not path.is_file():
        problem = "are a folder" if path.is_dir() else "do not exist"
        raise FileNotFoundError(f"weights '{path}' {problem}, expected a local file; nothing is downloaded")
    kind = recognise(path, f"weights '{path}'")
    if kind == "zip" and _is_program(path):
        raise ValueError(
            f"weights '{path}' are a TorchScript archive, a program, as OpenAI publishes them; expected a "
            "state dict: torch.save(torch.jit.load(...).state_dict(), ...) makes one of it"
        )
    try:
        found = load_file(path) if kind == "safetensors" else _unpickle(path)
    except UnpicklingError as error:  # torch would have one switch its safety off
        raise ValueError(f"weights '{path}' cannot be read: damaged, or no file of weights") from error
    except Exception as error:
        raise ValueError(f"weights '{path}' cannot be read: {str(error).splitlines()[0]}") from error
    part = next((found[name] for name in parts if isinstance(found, dict) and name in found), found)
    return _tensors(part, path)


def write_weights(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write named tensors as safetensors, atomically.

    Args:
        path: File to write; its folder is made.
        tensors: Of any device and layout; written row by row.
        metadata: Strings to store, in addition to the ``format`` that transformers needs.
    """
    path = Path(path)
    rows = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(rows, temporary, {"format": "pt", **metadata})
        sync(temporary)
    sync(path.parent)


def read_metadata(path: str | Path) -> dict[str, str]:
    """Read the strings that a safetensors file carries; other files have none."""
    if recognise(path, f"weights '{path}'") != "safetensors":
        return {}
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def bare(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefixes that compiled and parallel training adds to names."""
    return {_bare(name): tensor for name, tensor in weights.items()}


def check(found: Mapping[str, Tensor], expected: Mapping[str, Sequence[int]], name: str) -> None:
    """Check that weights have exactly the expected names and shapes.

    Args:
        found: The weights.
        expected: Shape of each.
        name: File or folder that they are from, for the message.

    Raises:
        ValueError: If a name is missing or unknown, or a shape differs; lists the first few of each.
    """
    shapes = {
        key: f"{key} {tuple(found[key].shape)} instead of {tuple(shape)}"
        for key, shape in expected.items()
        if key in found and tuple(found[key].shape) != tuple(shape)
    }
    problems = {
        "missing": [key for key in expected if key not in found],
        "not expected": [key for key in found if key not in expected],
        "of another shape": list(shapes.values()),
    }
    messages = [_list(keys, kind, len(expected)) for kind, keys in problems.items() if keys]
    if messages:
        raise ValueError(f"{name}: {'; '.join(messages)}")


def sha256(path: str | Path) -> str:
    """Hash a file, as hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


MODEL_FILES = (".json", ".safetensors", ".model", ".txt")
"""Endings of the files that a model's behaviour depends on: configuration, weights, tokenizer."""


def model_folder_sha256(folder: str | Path) -> str:
    """Hash the names and contents of a model's files in a folder, as hexadecimal digits."""
    files = sorted(path for path in Path(folder).iterdir() if path.suffix in MODEL_FILES and path.is_file())
    lines = "".join(f"{path.name} {sha256(path)}\n" for path in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Hash tensors by names, shapes, dtypes and bytes, in the order of their names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        total.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


PLAIN = (int, float, str, bytes, list, tuple, dict, type(None))
"""Types of values that may be among tensors: a step, a name, settings."""


class Inert:
    """Stands in for a foreign class or function of a pickle: takes whatever it is given and does nothing."""

    def __new__(cls, *args: object) -> Any:
        """Ignore the arguments."""
        return super().__new__(cls)

    def __init__(self, *args: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        """Ignore the state."""


class InertDict:
    """The same for a foreign kind of dict, which pickles fill after they made it."""

    def __new__(cls, *args: object) -> Any:
        """Return an empty dict: torch's loader fills nothing else."""
        return {}


def _unpickle(path: Path) -> Any:
    with path.open("rb") as stream:  # by the descriptor: torch would take a name for what is in the file
        if not zipfile.is_zipfile(path):  # written before torch 1.6: tensors and primitives only
            return torch.load(stream, map_location="cpu", weights_only=True)
        file = f"/dev/fd/{stream.fileno()}"
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        inert = [(InertDict if name.lower().endswith("dict") else Inert, name) for name in foreign]
        with torch.serialization.safe_globals(inert):  # type: ignore[arg-type]
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)


def _is_program(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def _tensors(found: Any, path: Path) -> dict[str, Tensor]:
    found = found.get("state_dict", found) if isinstance(found, dict) else found
    if not isinstance(found, dict):
        raise ValueError(f"weights '{path}' hold a {type(found).__name__}, expected tensors by name")
    holding = [each for each in (found, *found.values()) if isinstance(each, dict) and _holds_tensors(each)]
    if not holding or (len(holding) > 1 and holding[0] is not found):
        keys = ", ".join(f"'{key}'" for key in list(found)[:SHOWN]) or "nothing"
        raise ValueError(f"weights '{path}' hold {keys}, expected tensors by name, or one dict of them")
    named = {name: value for name, value in holding[0].items() if not isinstance(value, PLAIN)}
    for name, value in named.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"weights '{path}': '{name}' is a {type(value).__name__}, expected a tensor")
    return named


def _holds_tensors(found: dict[Any, Any]) -> bool:
    return any(isinstance(name, str) and isinstance(value, Tensor) for name, value in found.items())


def _bare(name: str) -> str:
    return name.removeprefix("_orig_mod.").removeprefix("module.").removeprefix("_orig_mod.")


def _list(keys: list[str], kind: str, total: int) -> str:
    more = ", ..." if len(keys) > SHOWN else ""
    of = f"{len(keys)} of {total}" if kind != "not expected" else f"{len(keys)}"
    return f"{of} weights {kind} ({', '.join(keys[:SHOWN])}{more})"

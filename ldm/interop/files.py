"""Files of weights and settings, as other programs read and write them."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm import checkpoint as ckpt
from ldm.cli import version
from ldm.replacing import replacing, sync, unfinished, write_text


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


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read named tensors from safetensors, or from a pickle of torch's without running what is in it.

    Old checkpoints of Lightning hold objects of its callbacks beside the weights. Stand-ins take their place:
    nothing is imported, nothing of the file is called.

    Args:
        path: File ending in .safetensors, or else a pickle. Its ``state_dict`` is taken where it has one.

    Returns:
        Tensors on the CPU in the file's dtype, mapped into memory rather than read where that can be.

    Raises:
        FileNotFoundError: If there is no file.
        ValueError: If it is damaged, holds no mapping of tensors, or is a program (TorchScript).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"weights '{path}' do not exist: expected a .safetensors, .ckpt, .pt or .bin")
    try:
        found = load_file(path) if path.suffix == ".safetensors" else _unpickle(path)
    except UnpicklingError as error:  # torch would have one switch its safety off
        raise ValueError(f"weights '{path}' cannot be read: damaged, or no file of weights") from error
    except Exception as error:
        raise ValueError(f"weights '{path}' cannot be read: {str(error).splitlines()[0]}") from error
    return _tensors(found, path)


def write_weights(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write named tensors as safetensors, atomically.

    Args:
        path: File to write; its folder is made.
        tensors: Of any device and layout; written row by row.
        metadata: Strings that the file carries, beside the ``format`` that transformers asks for.
    """
    path = Path(path)
    rows = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(rows, temporary, {"format": "pt", **metadata})
        sync(temporary)
    sync(path.parent)


def read_metadata(path: str | Path) -> dict[str, str]:
    """Read the strings that a safetensors file carries; other files have none."""
    if Path(path).suffix != ".safetensors":
        return {}
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        FileNotFoundError: If there is no file.
        ValueError: If it is no JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"'{path}' does not exist")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"'{path}' is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"'{path}' holds a {type(found).__name__}, expected a JSON object")
    return found


def write_json(path: str | Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, atomically; its folder is made."""
    write_text(Path(path), json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def record(checkpoint: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """Say what produced an export: what its ldm.json holds.

    Args:
        checkpoint: What ``ldm.checkpoint.read`` returned.
        path: The checkpoint file or run folder that it was read from.
    """
    return {
        "software": f"ldm {version()}",
        "source": str(path),
        "sha256": ckpt.sha256(path),
        "stage": checkpoint["stage"],
        "weights": checkpoint.get("weights", "raw"),
        "samples_seen": checkpoint.get("samples_seen"),
        "image_size": checkpoint.get("image_size"),
        "upstream": checkpoint.get("upstream", {}),
        "config": checkpoint["config"],
    }


def _unpickle(path: Path) -> Any:
    if not zipfile.is_zipfile(path):  # written before torch 1.6: tensors and primitives only
        return torch.load(path, map_location="cpu", weights_only=True)
    foreign = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    inert = [(InertDict if name.lower().endswith("dict") else Inert, name) for name in foreign]
    with torch.serialization.safe_globals(inert):  # type: ignore[arg-type]
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _tensors(found: Any, path: Path) -> dict[str, Tensor]:
    found = found.get("state_dict", found) if isinstance(found, dict) else found
    if not isinstance(found, dict):
        raise ValueError(f"weights '{path}' hold a {type(found).__name__}, expected tensors by name")
    for name, value in found.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"weights '{path}': '{name}' is a {type(value).__name__}, expected a tensor")
    return dict(found)


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """Give a temporary folder to write an export to, which becomes ``out`` when it is whole.

    Raises:
        ValueError: If ``out`` has files: nothing is written over.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out: '{out}' is there already, expected an empty folder or none")
    temporary = unfinished(out)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)

"""Checkpoints of stages: found, verified, read safely, hashed, and rebuilt from the class that they name.

A checkpoint's ``config`` is ``{"class_path": ..., "init_args": {...}}`` of the stage, its ``state_dict``
holds averaged weights where the run averaged them, ``stage`` is its name, ``upstream`` what it was built on.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import zipfile
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from jsonargparse import ArgumentError, ArgumentParser
from torch import nn

from ldm import __version__
from ldm.io.artifacts import checkpoint_file, is_reference
from ldm.io.weights import recognise
from ldm.stage_protocols import Progress
from ldm.types import ImageKind

M = TypeVar("M", bound=nn.Module)
T = TypeVar("T")
Identity = tuple[int, int, int, int]

FORMAT = 2
"""Number of the layout of checkpoints; those of ldm 0.1 have none."""

_verified: set[Identity] = set()
_hashes: dict[Identity, str] = {}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of a stage. Its file is opened once: state and hash are of the same bytes.

    The file is mapped: tensors are read from disk when they are used, and a later writer of the same path,
    which replaces the file, changes nothing here. Writing to a tensor does not write to the file.
    """

    file: Path
    state: dict[str, Any] = field(repr=False)
    _identity: Identity = field(repr=False)
    _content: mmap.mmap = field(repr=False)

    @classmethod
    def open(cls, path: str | Path, stage: str | None = None) -> Checkpoint:
        """Open a checkpoint: tensors and primitives only.

        Args:
            path: Checkpoint file, run folder, which stands for its newest checkpoint, or artifact of W&B.
            stage: Name of the stage that must have written it; None accepts any.

        Raises:
            FileNotFoundError: If there is no checkpoint.
            ValueError: If it is damaged, of another program, of another version, or of another stage.
        """
        file = find(path)
        with file.open("rb") as stream:
            identity = _verify(stream, file)
            content = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            try:  # by the descriptor: another file may have this path by now
                descriptor = f"/dev/fd/{stream.fileno()}"
                state = torch.load(descriptor, map_location="cpu", weights_only=True, mmap=True)
            except Exception as error:
                raise ValueError(
                    f"checkpoint '{file}' cannot be read: {str(error).splitlines()[0]}"
                ) from error
        return cls(file, _check(state, file, stage), identity, content)

    @property
    def sha256(self) -> str:
        """SHA-256 of the file, as hexadecimal digits; computed once per process."""
        if self._identity not in _hashes:
            _hashes[self._identity] = hashlib.sha256(self._content).hexdigest()
        return _hashes[self._identity]

    @property
    def stage(self) -> str:
        """Name of the stage that wrote it."""
        return str(self.state["stage"])

    @property
    def weights(self) -> str:
        """Kind of its weights: "ema" or "raw"."""
        return str(self.state.get("weights", "raw"))

    @property
    def progress(self) -> Progress:
        """Optimizer steps and samples that it was trained for."""
        return saved_progress(self.state)

    @property
    def is_validated(self) -> bool:
        """Whether its run validated these weights, or does not say when it did."""
        steps = self.progress.steps
        return bool(self.state.get("validation", {"step": steps})["step"] == steps)

    @property
    def upstream(self) -> dict[str, str]:
        """Checkpoints that the stage was built on, by the path in its config, with their SHA-256."""
        return dict(self.state.get("upstream") or {})

    @property
    def net_config(self) -> dict[str, Any]:
        """``{"class_path": ..., "init_args": {...}}`` of the stage's ``net``."""
        return dict(self.state["config"]["init_args"]["net"])

    def load_net(self, expected: type[M]) -> M:
        """Rebuild the stage's ``net``, of class ``expected``, with the weights strictly loaded."""
        net, _ = instantiate(self.net_config, expected)
        weights = self.state["state_dict"]
        net.load_state_dict({k.removeprefix("net."): v for k, v in weights.items() if k.startswith("net.")})
        return net


def saved_progress(state: Mapping[str, Any]) -> Progress:
    """Return the optimizer steps and samples that the state of a checkpoint was trained for."""
    if "progress" not in state:
        raise ValueError("checkpoint has no 'progress': an ldm older than this one wrote it, train it again")
    return Progress(**state["progress"])


def header() -> dict[str, Any]:
    """Entries of every checkpoint about the program that writes it."""
    return {"ldm_version": __version__, "format": FORMAT}


def find(path: str | Path) -> Path:
    """Resolve a checkpoint file, a run folder (its newest checkpoint) or an artifact of W&B to the file.

    Raises:
        FileNotFoundError: If there is none; the message names the path.
        ValueError: If W&B does not have it, see ``ldm.io.artifacts``.
    """
    if is_reference(path):
        return checkpoint_file(str(path))
    path = Path(path)
    if path.is_file():
        return path
    last = path / "checkpoints" / "last.ckpt"
    if last.is_file():
        return last
    found = "is a folder without checkpoints/last.ckpt" if path.is_dir() else "does not exist"
    raise FileNotFoundError(f"checkpoint '{path}' {found}: expected a .ckpt file or the folder of a run")


def verify(path: str | os.PathLike[str]) -> None:
    """Compare the entries of a checkpoint file with their checksums, which torch writes but never compares.

    A file is verified once per process.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If an entry is missing or altered; the message names the file and the entry.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"checkpoint '{path}' does not exist")
    with Path(path).open("rb") as stream:
        _verify(stream, path)


def saved_kind(state: Mapping[str, Any]) -> ImageKind | None:
    """Return the kind of images that a checkpoint was trained on; None if it does not say."""
    found = state.get("image")
    return None if found is None else ImageKind(**found)


def instantiate(config: Mapping[str, Any], expected: type[T]) -> tuple[T, dict[str, Any]]:
    """Build ``{"class_path": ..., "init_args": {...}}`` of an ``expected`` class, checked like a YAML file.

    Returns:
        The object, and ``config`` with defaults filled in.

    Raises:
        ValueError: If it names another class: a checkpoint must not be able to call any function.
        ArgumentError: If the class does not take the arguments.
    """
    parser = ArgumentParser(exit_on_error=False)
    # a class of one's own needs no type hints
    parser.add_subclass_arguments(expected, "checkpoint", required=True, fail_untyped=False)
    name = config["class_path"]
    try:
        parsed = parser.parse_object({"checkpoint": deepcopy(dict(config))})
    except ArgumentError as error:
        if f"Import path {name} does not" not in str(error):
            raise
        raise ValueError(f"checkpoint names the class {name}, expected a {expected.__name__}") from error
    built: T = parser.instantiate(parsed).checkpoint
    return built, parsed.checkpoint.as_dict()


def _verify(stream: BinaryIO, path: str | os.PathLike[str]) -> Identity:
    """Verify an open file; return its identity."""
    stat = os.fstat(stream.fileno())
    identity = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
    if identity not in _verified:
        recognise(path, f"checkpoint '{path}'")
        try:
            with zipfile.ZipFile(stream) as entries:
                altered = entries.testzip()
        except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
            raise ValueError(
                f"checkpoint '{path}' cannot be read: {error}, expected a complete file"
            ) from error
        if altered is not None:
            raise ValueError(
                f"checkpoint '{path}' cannot be read: the checksum of its part '{altered}' is wrong"
            )
        _verified.add(identity)
    return identity


def _check(state: Any, file: Path, stage: str | None) -> dict[str, Any]:
    if not isinstance(state, dict) or state.get("stage") is None:
        raise ValueError(f"checkpoint '{file}' was not written by a stage of ldm: it names no stage")
    if (found := state.get("format")) is None:
        raise ValueError(
            f"checkpoint '{file}' was written by ldm 0.1, which ldm {__version__} cannot read: train it "
            "again, or export it with ldm.convert of ldm 0.1 and import that here"
        )
    if found != FORMAT:
        raise ValueError(
            f"checkpoint '{file}' has format {found} of ldm {state.get('ldm_version')}, expected format "
            f"{FORMAT} of ldm {__version__}: use the version that wrote it"
        )
    if state.get("config") is None:
        raise ValueError(
            f"checkpoint '{file}' cannot be rebuilt: its stage was trained in Python with a part that has no "
            "import path, such as a function: use a class, or see docs/python.md"
        )
    if stage is not None and state["stage"] != stage:
        raise ValueError(f"checkpoint '{file}' is of stage '{state['stage']}', expected stage '{stage}'")
    return state

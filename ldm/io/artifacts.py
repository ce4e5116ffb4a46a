"""Checkpoints in W&B: ``wandb:ENTITY/PROJECT/NAME:VERSION`` wherever a checkpoint or run folder is taken.

VERSION is exact, such as ``v3``, or an alias: ``latest``, ``best``, ``sha-...``. An alias may move, so
commands replace it by what it stands for now (``ldm.io.pins``), and records have the exact version.
``/best.ckpt`` behind it names another checkpoint of the artifact than its last.

Files are kept by the digest of their artifact, on this machine, in ``$LDM_CACHE`` or ``~/.cache/ldm``:

    artifacts/<digest>/{config.yaml, ..., checkpoints/last.ckpt}    laid out as a run folder
    artifacts/versions/<ENTITY>/<PROJECT>/<NAME>/v3.json            digest and files of an exact version

so an exact version that is there needs no network. One process at a time downloads; the others wait for it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ldm.io.atomic import unfinished, write_text
from ldm.io.lock import waiting
from ldm.io.wandb_client import Unreachable, ask

PREFIX = "wandb:"
RUN_FILES = ("config.yaml", "environment.json", "metrics.csv", "metrics.json", "evaluations.jsonl")
"""Files of a run folder, beside checkpoints, that an artifact of a run may have."""
LAST, BEST = "last.ckpt", "best.ckpt"
_FORM = re.compile(r"wandb:([^/:]+)/([^/:]+)/([^/:]+):([^/:]+)(?:/([^/:]+\.ckpt))?")


@dataclass(frozen=True)
class Reference:
    """An artifact of W&B, and a checkpoint in it.

    Args:
        entity: User or team.
        project: Project.
        name: Name of the artifact.
        version: ``v3``, or an alias.
        file: Its checkpoint; None is the last, or the one that the alias is of.
    """

    entity: str
    project: str
    name: str
    version: str
    file: str | None = None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Read ``wandb:ENTITY/PROJECT/NAME:VERSION``.

        Raises:
            ValueError: If it is not of that form.
        """
        found = _FORM.fullmatch(text)
        if found is None:
            raise ValueError(
                f"got '{text}', expected wandb:ENTITY/PROJECT/NAME:VERSION, e.g. wandb:me/ldm/demo-clip:best"
            )
        return cls(*found.groups())

    def __str__(self) -> str:
        """Return the form that ``parse`` reads."""
        return f"{PREFIX}{self.path}:{self.version}" + (f"/{self.file}" if self.file else "")

    @property
    def path(self) -> str:
        """Entity, project and name, as W&B joins them."""
        return f"{self.entity}/{self.project}/{self.name}"

    @property
    def is_exact(self) -> bool:
        """Whether it can never stand for anything else."""
        return re.fullmatch(r"v\d+", self.version) is not None


@dataclass(frozen=True)
class Found:
    """What is known of an exact version.

    Args:
        reference: The exact version, with the checkpoint unless it is the one taken by default.
        digest: W&B's, of all contents.
        files: Names of its files.
    """

    reference: Reference
    digest: str
    files: tuple[str, ...]

    @property
    def checkpoint(self) -> str:
        """Name of the checkpoint.

        Raises:
            ValueError: If there is none.
        """
        usual = [self.reference.file] if self.reference.file else [LAST, BEST]
        found = [name for name in usual if name in self.files]
        others = [name for name in self.files if name.endswith(".ckpt")]
        if not found and (self.reference.file or len(others) != 1):
            listed = ", ".join(sorted(self.files)[:4]) or "nothing"
            raise ValueError(f"'{self.reference}' has no checkpoint {usual[0]}, but {listed}")
        return (found or others)[0]


def is_reference(path: str | Path) -> bool:
    """Whether a path names an artifact of W&B."""
    return str(path).startswith(PREFIX)


def checkpoint_file(text: str) -> Path:
    """Return the checkpoint that a reference names, on this machine: downloaded if it is not there.

    Raises:
        Unreachable: If it is not there, or its version is not exact, and the server gives no answer.
        ValueError: If there is none, or the server refuses it.
        OSError: If the cache cannot be written.
    """
    found = look_up(text)
    file = _folder(found) / "checkpoints" / found.checkpoint
    if not file.is_file():
        _download(found, [*_run_files(found), found.checkpoint])
    return file


def run_folder_of(text: str) -> Path:
    """Return the folder with the files of a run, without its checkpoints, that a reference names.

    Raises:
        Unreachable, ValueError, OSError: As ``checkpoint_file``.
    """
    found = look_up(text)
    if not all((_folder(found) / name).is_file() for name in _run_files(found)):
        _download(found, _run_files(found))
    return _folder(found)


def look_up(text: str) -> Found:
    """Find out what a reference stands for: in the cache if it is exact, else at the server.

    Raises:
        Unreachable, ValueError, OSError: As ``checkpoint_file``.
    """
    reference = Reference.parse(text)
    if reference.is_exact and (known := _version_file(reference)).is_file():
        content = json.loads(known.read_text(encoding="utf-8"))
        return Found(reference, content["digest"], tuple(content["files"]))
    with _explained(text):
        found = ask(lambda api: _found(reference, api.artifact(f"{reference.path}:{reference.version}")))
    with _writing():
        content = {"digest": found.digest, "files": found.files}
        path = _version_file(found.reference)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(content, indent=2) + "\n")
    return found


def _found(reference: Reference, artifact: Any) -> Found:
    """Read what the server says of an artifact."""
    entries = artifact.manifest.entries.values()
    files = tuple(str(entry.path) for entry in entries if entry.ref is None and "/" not in str(entry.path))
    alias, hashes = reference.version, artifact.metadata.get("checkpoints") or {}
    meant = (
        BEST
        if alias == "best"
        else next((n for n, sha in hashes.items() if alias == f"sha-{sha[:16]}"), None)
    )
    exact = replace(reference, version=artifact.version)
    if reference.file is None and meant in files and meant != LAST:
        exact = replace(exact, file=meant)
    return Found(exact, artifact.digest, files)


def _run_files(found: Found) -> list[str]:
    return [name for name in RUN_FILES if name in found.files]


def _download(found: Found, names: Sequence[str]) -> None:
    """Bring files into the cache, each of them complete or not at all, the last one at the end."""
    folder, reference = _folder(found), found.reference
    with _writing():
        folder.mkdir(parents=True, exist_ok=True)
        with waiting(folder.with_name(f".{found.digest}.lock")):  # the others find it there
            places = {name: folder / _subfolder(name) / name for name in names}
            missing = [name for name, place in places.items() if not place.is_file()]
            temporary = unfinished(folder)
            if not missing:
                return
            try:
                with _explained(str(reference)):
                    ask(lambda api: _fetch(api, reference, missing, temporary), lambda: _size(temporary))
                for name in missing:
                    places[name].parent.mkdir(exist_ok=True)
                    os.replace(temporary / name, places[name])
            finally:
                shutil.rmtree(temporary, ignore_errors=True)


def _fetch(api: Any, reference: Reference, names: Sequence[str], folder: Path) -> None:
    artifact = api.artifact(f"{reference.path}:{reference.version}")
    for name in names:
        artifact.download(str(folder), path_prefix=name, skip_cache=True, multipart=False)
        entry = artifact.get_entry(name)
        if entry.digest_algorithm().name.endswith("MD5") and _md5(folder / name) != entry.digest:
            raise ValueError(f"{name} arrived damaged, repeat the command")


def _subfolder(name: str) -> str:
    return "checkpoints" if name.endswith(".ckpt") else ""


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return base64.b64encode(hashlib.file_digest(file, "md5").digest()).decode()


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*") if path.is_file())


def cache() -> Path:
    """Return the folder of the cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("LDM_CACHE") or Path(home) / "ldm") / "artifacts"


def _folder(found: Found) -> Path:
    return cache() / found.digest


def _version_file(reference: Reference) -> Path:
    return cache() / "versions" / reference.path / f"{reference.version}.json"


@contextmanager
def _explained(text: str) -> Iterator[None]:
    """Name the reference in what the client says."""
    try:
        yield
    except Unreachable as error:
        advice = "" if Reference.parse(text).is_exact else "; exact versions, such as v3, are cached"
        raise Unreachable(f"'{text}': {error}{advice}") from error
    except ValueError as error:
        raise ValueError(f"'{text}' cannot be had from W&B: {error}") from error


@contextmanager
def _writing() -> Iterator[None]:
    """Name the cache in an error of the disk."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"LDM_CACHE: '{cache()}' cannot be written ({error.strerror}): set it to another folder"
        ) from error

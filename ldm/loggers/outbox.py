"""Artifacts and lineage that W&B's server may lack, in the client's folder of a run: ``wandb/outbox.jsonl``.

Each is noted with the copies of its files that the client keeps, and crossed out once the server has it. An
artifact that is sent twice is there once, by its digest.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ldm.io.atomic import write_text
from ldm.io.weights import sha256

OUTBOX = "outbox.jsonl"
Entry = dict[str, Any]


@dataclass(frozen=True)
class Artifact:
    """Files with a name and a version, that W&B draws lineage between.

    Args:
        name: Letters, digits, ``-``, ``_`` and ``.``.
        kind: What W&B calls its type.
        versions: Names of this version: other contents have others.
        files: Files that are uploaded, by their names in the artifact.
        references: Files that are named by their path and size only, such as shards.
        metadata: Metadata of the artifact; "checkpoints" has SHA-256 of files.
    """

    name: str
    kind: str
    versions: Sequence[str]
    files: Mapping[str, Path] = field(default_factory=dict)
    references: Sequence[Path] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)


class Outbox:
    """The entries of a run.

    Args:
        folder: The client's folder of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / OUTBOX

    @property
    def exists(self) -> bool:
        """Whether anything was ever noted."""
        return self.path.is_file()

    def entries(self) -> list[Entry]:
        """List them, in order."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.exists else []
        return [json.loads(line) for line in lines]

    def add(self, entry: Entry) -> None:
        """Note one, in place of an equal one of an earlier begin."""
        others = [each for each in self.entries() if {**each, "begun": entry["begun"]} != entry]
        self.replace([*others, entry])

    def replace(self, entries: Iterable[Entry]) -> None:
        """Keep these alone."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, "".join(json.dumps(entry) + "\n" for entry in entries))


def described(artifact: Artifact, copies: Mapping[str, str | None]) -> Entry:
    """Describe an artifact for the outbox.

    Args:
        artifact: The artifact.
        copies: The client's copy of each of its files.
    """
    files = {name: [copies[name], str(path.absolute())] for name, path in artifact.files.items()}
    references = [str(path.absolute()) for path in artifact.references]
    return {**asdict(artifact), "files": files, "references": references}


def restored(entry: Entry) -> Artifact:
    """Undo ``described``: with the copies, or with the files themselves where they are what they were.

    Raises:
        ValueError: If a checkpoint was replaced since, and its copy is gone.
    """
    hashes = entry["metadata"].get("checkpoints", {})
    files = {}
    for name, (copy, original) in entry["files"].items():
        is_there = copy is not None and Path(copy).is_file()
        files[name] = Path(copy if is_there else original)
        if not is_there and hashes.get(name, "") not in ("", _hash(original)):
            raise ValueError(f"'{original}' was replaced since, and the copy '{copy}' is gone")
    return Artifact(**{**entry, "files": files, "references": list(map(Path, entry["references"]))})


def _hash(path: str) -> str | None:
    return sha256(path) if Path(path).is_file() else None

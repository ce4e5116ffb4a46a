"""Snapshots of averaged weights, in the folder of a run: ``averages/step=00001000.safetensors``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from ldm.io.atomic import sweep
from ldm.io.weights import read_metadata, write_weights
from ldm.stage_protocols import Progress

FOLDER = "averages"
"""Folder of a run that holds them."""
Averages = list[dict[str, Tensor]]
"""For each length the averaged weights by their names."""


@dataclass(frozen=True)
class Snapshot:
    """What a snapshot is of.

    Args:
        progress: Of the stage.
        time: Steps averaged over.
        sigma_rel: Lengths of the averages in it.
        aliases: Further names of tied weights, each with the name that the average has.
    """

    progress: Progress
    time: int
    sigma_rel: Sequence[float]
    aliases: Mapping[str, str]


def snapshot_interval(step: int, every: int, most: int) -> int:
    """Return the steps between two snapshots: ``every``, doubled until there are not more than ``most``."""
    interval = every
    while step // interval > most:
        interval *= 2
    return interval


def write_snapshot(run: Path, snapshot: Snapshot, averages: Averages) -> None:
    """Write a snapshot, atomically.

    Raises:
        OSError: If it cannot be written; what is there stays.
    """
    path = _path(run, snapshot.progress.steps)
    sweep(path.parent)
    tensors = {f"{i}.{name}": value for i, each in enumerate(averages) for name, value in each.items()}
    write_weights(path, tensors, {"snapshot": json.dumps(asdict(snapshot))})


def thin(run: Path, interval: int, last: int) -> None:
    """Delete snapshots of steps that ``interval`` does not divide, but for the ``last`` one."""
    for step, path in _files(run):
        if step % interval and step != last:
            path.unlink()


def forget_after(run: Path, step: int) -> None:
    """Delete snapshots of later steps: of training that was not saved, and begins again at ``step``."""
    for found, path in _files(run):
        if found > step:
            path.unlink()


def read_snapshots(run: Path) -> dict[Path, Snapshot]:
    """Read what the snapshots of a run are of, the earliest first.

    Raises:
        ValueError: If one cannot be read.
    """
    found = {}
    for _, path in _files(run):
        try:
            fields: dict[str, Any] = json.loads(read_metadata(path)["snapshot"])
        except Exception as error:
            raise ValueError(
                f"'{path}' cannot be read, expected a snapshot of averages: delete it"
            ) from error
        found[path] = Snapshot(**{**fields, "progress": Progress(**fields["progress"])})
    return found


def read_averages(path: Path, index: int) -> Iterator[tuple[str, Tensor]]:
    """Read the averaged weights of the length ``index``, one after the other, each with its name."""
    prefix = f"{index}."
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118  (it is no dict)
            if name.startswith(prefix):
                yield name.removeprefix(prefix), file.get_tensor(name)


def _path(run: Path, step: int) -> Path:
    return run / FOLDER / f"step={step:08d}.safetensors"


def _files(run: Path) -> list[tuple[int, Path]]:
    paths = (run / FOLDER).glob("step=*.safetensors")
    return sorted((int(path.stem.removeprefix("step=")), path) for path in paths)

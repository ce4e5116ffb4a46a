"""Sends a run to W&B from what its folder knows: rows, image grids, configuration, records."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from ldm.loggers.directions import Direction
from ldm.loggers.outbox import Outbox
from ldm.loggers.wandb import WandbSamplesLogger
from ldm.runs.folder import RunFolder
from ldm.runs.options import WandB
from ldm.runs.tracking import record_config


@dataclass(frozen=True)
class Sent:
    """What was sent.

    Args:
        rows: Rows, an image grid being one.
        artifacts: Artifacts, and edges of lineage.
    """

    rows: int
    artifacts: int

    def __str__(self) -> str:
        """Count them."""
        return f"{self.rows} rows" + (f" and {self.artifacts} artifacts" if self.artifacts else "") + " sent"


def send(folder: Path, seconds: float) -> Sent:
    """Send what the server lacks of a run, and its configuration, files and records again.

    Args:
        folder: Folder of the run, which no process trains, or that of ``ldm.encode``.
        seconds: How long to wait at most until everything is sent.

    Raises:
        ValueError: If it is no run's folder, or if W&B refuses it.
        Unreachable: If the server gives no answer.
        NotSent: If not everything was sent in time.
    """
    config = _load(folder / "config.yaml")
    if not config and (outbox := Outbox(folder / "wandb")).exists:
        return _send_artifacts(folder, outbox, seconds)
    if not config:
        raise ValueError(f"'{folder}' is no run folder: expected config.yaml, as ldm.fit leaves it")
    known = {field.name for field in fields(WandB)}
    given = {name: value for name, value in (config.get("wandb") or {}).items() if name in known}
    settings = replace(WandB(**given), mode="online", required=True)
    run = RunFolder(folder)
    logger = run.wandb(settings, _job_type(config), directions=lambda: _directions(folder))
    with _sending(logger, folder, seconds):
        here = _load(folder / "environment.json")
        here.pop("packages", None)
        record_config(logger, config, here)
        logger.keep_files(run.records)
        if records := _records(folder / "evaluations.jsonl"):
            logger.experiment.config.update({"records": records}, allow_val_change=True)
        rows = logger.catch_up()
    return Sent(rows, len(logger.caught_up))


def _send_artifacts(folder: Path, outbox: Outbox, seconds: float) -> Sent:
    """Send what a command that is no run, such as ``ldm.encode``, noted in a folder."""
    if not (entries := outbox.entries()):
        return Sent(0, 0)
    known = dict(entries[0]["run"])
    kind, group = known.pop("job_type"), known.pop("group")
    logger = RunFolder(folder).wandb(WandB(mode="online", required=True, **known), kind, group)
    with _sending(logger, folder, seconds):
        logger.catch_up()
    return Sent(0, len(logger.caught_up))


@contextmanager
def _sending(logger: WandbSamplesLogger, folder: Path, seconds: float) -> Iterator[None]:
    """End the run of W&B after the ``with`` block; an error if not everything arrived."""
    is_sent = False
    try:
        yield
    finally:
        is_sent = logger.end(0, seconds, lambda: False)
    if not is_sent:
        raise NotSent(f"'{folder}': not everything was sent within {seconds:g} s: repeat the command")


class NotSent(ValueError):
    """Not everything was sent; the exit code is EX_TEMPFAIL of sysexits.h: it may be repeated."""

    exit_code = 75


def _load(path: Path) -> dict[str, Any]:
    """Read YAML, which includes JSON; an absent file is empty."""
    found = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    return found if isinstance(found, dict) else {}


def _directions(folder: Path) -> Mapping[str, Direction]:
    return _load(folder / "metrics.json")


def _job_type(config: Mapping[str, Any]) -> str:
    """Name the stage; one whose class cannot be imported here by its class."""
    module, _, name = str(config["model"]["class_path"]).rpartition(".")
    try:
        return str(getattr(import_module(module), name).name)
    except (ImportError, AttributeError):
        return name.lower()


def _records(path: Path) -> dict[str, dict[str, Any]]:
    """Read how each value was obtained, the last time."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]
    own = ("name", "value", "evaluation")
    return {line["name"]: {k: v for k, v in line.items() if k not in own} for line in found if "name" in line}

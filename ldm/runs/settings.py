"""Settings of a run by dotted names, and what differs between a finished run and a later call of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

TRAINED = ("model", "data", "ema", "seed_everything", "checkpoints", "sample_grid", "trainer")
"""Sections of the configuration whose settings change what a run leaves."""
TRAINER = ("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "deterministic")
"""Settings of the trainer that do; others belong to the machine, or may change, such as its callbacks."""
MACHINE = ("data.num_workers",)
ABSOLUTE = re.compile(r"(?<![^\s='\"\[,])/(?:[^\s/'\",]+/)*([^\s/'\",]+/[^\s/'\",]+)")
"""An absolute path in a text; its group is the last two parts."""


def flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Flatten nested settings to dotted names; ``class_path`` and ``init_args`` are left out of them."""
    inner: list[tuple[Any, Any]] = list(value.items()) if isinstance(value, dict) else []
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        inner = list(enumerate(value))
    if not inner:
        yield key, value
    for name, item in inner:
        part = "" if name in ("class_path", "init_args") else str(name)
        yield from flat(item, f"{key}.{part}".strip("."))


def relative(value: Any) -> Any:
    """Shorten absolute paths to their last two parts: the others tell of a machine, not of a run."""
    if isinstance(value, list | tuple):
        return [relative(item) for item in value]
    return ABSOLUTE.sub(r"\1", value) if isinstance(value, str) else value


def check_same(reason: Exception, now: Mapping[str, Any], recorded: Path) -> None:
    """Check that a finished run was trained with the settings that it is called with now.

    Args:
        reason: Why nothing is left to train.
        now: Resolved configuration of the call.
        recorded: config.yaml of the run; without it nothing is checked.

    Raises:
        ValueError: If settings differ: the call would train nothing of what it asks for.
    """
    if not recorded.is_file():
        return
    then = _trained(yaml.safe_load(recorded.read_text(encoding="utf-8")))
    wanted = _trained(now)
    # a setting that only one of them has belongs to another class, which differs itself, or another version
    changed = [name for name in sorted(then.keys() & wanted.keys()) if then[name] != wanted[name]]
    if not changed:
        return
    some = "; ".join(f"{name}: {_short(then[name])}, now {_short(wanted[name])}" for name in changed[:2])
    more = f" and {len(changed) - 2} more" if len(changed) > 2 else ""
    raise ValueError(
        f"--run '{recorded.parent.name}' is finished, and was trained with other settings ({some}{more}): "
        "nothing is trained; name another folder with --run"
    ) from reason


def _trained(config: Mapping[str, Any]) -> dict[str, str]:
    counted = {name: config[name] for name in TRAINED if config.get(name) is not None}
    found = {name: str(relative(value)) for name, value in flat(counted)}
    ours = {f"trainer.{name}" for name in TRAINER}
    return {k: v for k, v in found.items() if k not in MACHINE and (k in ours or not k.startswith("trainer"))}


def _short(value: str) -> str:
    return value if len(value) <= 30 else f"...{value[-27:]}"

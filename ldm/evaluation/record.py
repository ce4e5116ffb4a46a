"""The record of a number, as lines of JSON: nothing is reported without it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypedDict

from torch import nn

from ldm.io.atomic import write_text
from ldm.metrics.metric import Metadata


def describe(thing: object) -> str:
    """Write an object as its class and public attributes: ``DDIM(num_steps=25, spacing=Leading(offset=1))``.

    Of a network within, the class alone: its weights are named elsewhere.
    """
    inside = {**vars(thing), **getattr(thing, "_modules", {})}
    public = {k: v for k, v in inside.items() if not k.startswith("_") and k != "training"}
    shown = [f"{k}={_brief(v)}" for k, v in public.items() if _is_setting(v)]
    return f"{type(thing).__name__}({', '.join(shown)})"


def _is_setting(value: object) -> bool:
    plain = isinstance(value, str | int | float | bool | type(None))
    return plain or type(value).__module__.partition(".")[0] == __name__.partition(".")[0]


def _brief(value: object) -> str:
    if isinstance(value, str | int | float | bool | type(None)):
        return str(value)
    is_network = isinstance(value, nn.Module) and any(True for _ in value.parameters())
    return type(value).__name__ if is_network else describe(value)


def describe_sampling(stage: object) -> Metadata:
    """Describe sampler, steps and guidance of a stage, as far as it has them."""
    metadata: Metadata = {}
    for name in ("sampler", "guidance"):
        if (setting := getattr(stage, name, None)) is not None:
            metadata[name] = describe(setting)
    steps = getattr(getattr(stage, "sampler", None), "num_steps", None)
    return metadata | ({"steps": steps} if isinstance(steps, int) else {})


class When(TypedDict):
    """When something was measured.

    Args:
        samples: Training samples seen.
        evaluation: By which evaluation of the run.
    """

    samples: int
    evaluation: str


def append_lines(path: Path, when: When, lines: Iterable[Mapping[str, object]]) -> None:
    """Append records of an evaluation, one line each.

    Those of the same time or later, of a run that was interrupted and went back to a checkpoint, are dropped.
    A line that cannot be read stays as it is.
    """
    kept = [line for line in _lines(path) if not _is_undone(line, when)]
    text = "".join(f"{line}\n" for line in [*kept, *(_line({**line, **when}) for line in lines)])
    write_text(path, text)


def _is_undone(line: str, now: When) -> bool:
    try:
        then = json.loads(line)
        return bool(then["evaluation"] == now["evaluation"] and then["samples"] >= now["samples"])
    except (ValueError, KeyError, TypeError):  # damaged, or written by hand
        return False


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def _line(values: Mapping[str, object]) -> str:
    return json.dumps(dict(values), ensure_ascii=False)

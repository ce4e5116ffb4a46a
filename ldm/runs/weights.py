"""``--weights`` of ``ldm.fit``: what a run says where they are not used, or are missing."""

from __future__ import annotations

from pathlib import Path

import yaml
from jsonargparse import Namespace


def keep_weights(config: Namespace, start: Path | None) -> str | None:
    """Set ``weights`` of a resumed run to what its config.yaml has, for its checkpoint replaces them.

    Args:
        config: Resolved configuration; its ``weights`` may change.
        start: Checkpoint that training continues from; None starts afresh.

    Returns:
        A warning if other weights are given, else None.
    """
    if start is None:
        return None
    given, config.weights = config.weights, _recorded(Path(config.run, "config.yaml"))
    if given in (None, config.weights):
        return None
    if config.ckpt_path != "last":
        return f"--weights {given} is not used: --ckpt_path has all weights: leave out one of the two"
    return f"--weights {given} is not used: '{config.run}' already has a checkpoint: give another --run"


def frozen_at_random(config: Namespace) -> str | None:
    """Return a warning if a fresh run freezes weights that were never trained, else None."""
    frozen = config.get("model.init_args.frozen")
    if not frozen or config.weights is not None:
        return None
    names = ", ".join(frozen) if isinstance(frozen, list | tuple) else frozen
    return f"model.frozen: [{names}] without --weights: random weights are never trained; give --weights RUN"


def _recorded(path: Path) -> str | None:
    found = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
    return found.get("weights") if isinstance(found, dict) else None

"""Checkpoints of our stages with weights from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.checkpointing.writer import AtomicCheckpointIO
from ldm.io.checkpoint import Checkpoint, header


def write_checkpoint(
    out: str | Path,
    stage: str,
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    source: Mapping[str, Any],
    image_size: int | None = None,
    upstream: Mapping[str, str] | None = None,
) -> Path:
    """Write a run folder's checkpoint: what later stages, metrics and ``ldm.fit --weights`` start from.

    Args:
        out: Run folder, one that has no checkpoint yet.
        stage: Name of the stage.
        config: ``{"class_path": ..., "init_args": {...}}`` that rebuilds it.
        weights: Its state dict.
        source: Where the weights come from.
        image_size: Side of the images that it was trained on, if known.
        upstream: Checkpoints that the stage is built on, with their SHA-256.

    Raises:
        ValueError: If the folder has a checkpoint.
    """
    path = Path(out) / "checkpoints" / "last.ckpt"
    if path.exists():
        raise ValueError(f"--out: '{out}' already has checkpoints/last.ckpt, expected a folder without a run")
    state = {
        **header(),
        "stage": stage,
        "config": dict(config),
        "state_dict": dict(weights),
        "upstream": dict(upstream or {}),
        "progress": {"steps": 0, "samples": 0},
        "image_size": image_size,
        "source": dict(source),
    }
    AtomicCheckpointIO().save_checkpoint(state, path)
    return path


def open_exported(run: str | Path) -> Checkpoint:
    """Open the checkpoint of a diffusion stage, or of an autoencoder, which leaves alone.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is damaged or of another stage.
    """
    checkpoint = Checkpoint.open(run)
    if checkpoint.stage not in ("diffusion", "autoencoder"):
        raise ValueError(
            f"checkpoint '{checkpoint.file}' is of stage '{checkpoint.stage}', expected stage 'diffusion' or "
            "'autoencoder'"
        )
    return checkpoint

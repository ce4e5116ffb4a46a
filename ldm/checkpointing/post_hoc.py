"""Checkpoints with averages of any length, made of a run's snapshots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.checkpointing.snapshots import FOLDER, Snapshot, read_averages, read_snapshots
from ldm.checkpointing.writer import LAST, AtomicCheckpointIO
from ldm.io.checkpoint import Checkpoint, header
from ldm.io.upstream import MODEL_FOLDERS, keep_upstream, rebuilding
from ldm.optim.power_average import Profile, reconstruction

KEPT = ("stage", "config", "upstream", MODEL_FOLDERS, "image_size", "image", "source")
"""Entries of a run's checkpoint that hold for other averages of its weights too."""


def reconstruct(
    run: str | Path, sigma_rel: float, out: str | None = None, step: int | None = None
) -> tuple[Path, list[str]]:
    """Write a checkpoint of a run whose weights are averaged over another length.

    Its run has snapshots, of the callback PostHocEMA (Karras et al. 2024, arXiv:2312.02696, section 3).
    Commands and later stages take it like others; training does not go on from it.

    Args:
        run: Run folder.
        sigma_rel: Length of the average in units of the training up to it, in (0, 0.288], e.g. 0.07.
        out: File that ends in .ckpt, or folder of a run to be made; default: sigma_rel=....ckpt beside the
            run's own checkpoints.
        step: Optimizer step of one of the snapshots, at which the average ends; default: the last.

    Returns:
        The file, and what should be known about it.

    Raises:
        FileNotFoundError: If the run has no checkpoint.
        ValueError: If it has no snapshots, none of that step, or is of an autoencoder, whose latents were
            measured with its own average; if there is a checkpoint in ``out``.
    """
    checkpoint, folder = Checkpoint.open(run), Path(run)
    if checkpoint.stage == "autoencoder":
        raise ValueError(
            f"--run: '{run}' is an autoencoder, expected another stage: the scale of its latents was "
            "measured with the weights of its checkpoint"
        )
    chosen = _until(read_snapshots(folder), step, folder)
    last = list(chosen.values())[-1]
    stored = [
        (path, i, Profile(s, each.time))
        for path, each in chosen.items()
        for i, s in enumerate(each.sigma_rel)
    ]
    parts, deviation = reconstruction([profile for *_, profile in stored], Profile(sigma_rel, last.time))
    average = _sum([(path, i, float(part)) for (path, i, _), part in zip(stored, parts, strict=True)])
    average |= {alias: average[name] for alias, name in last.aliases.items()}
    target = _target(folder, sigma_rel, step, out)
    AtomicCheckpointIO().save_checkpoint(_state(checkpoint, last, average, sigma_rel), target)
    if target.name == LAST:
        with rebuilding(checkpoint):
            keep_upstream(target.parent.parent, checkpoint.upstream)
    return target, [
        f"of {len(chosen)} snapshots, the last of step {last.progress.steps}; the profile is within "
        f"{deviation:.2%} of one that is tracked"
    ]


def _until(found: dict[Path, Snapshot], step: int | None, run: Path) -> dict[Path, Snapshot]:
    """Take the snapshots up to a step."""
    steps = [each.progress.steps for each in found.values()]
    if not steps:
        raise ValueError(
            f"--run: '{run}' has no snapshots in {FOLDER}/, expected a run with "
            "--trainer.callbacks+=PostHocEMA"
        )
    if step is not None and step not in steps:
        nearest = min(steps, key=lambda other: abs(other - step))
        raise ValueError(
            f"--step: there is no snapshot of {step} in '{run}/{FOLDER}', the nearest is {nearest}"
        )
    return {path: each for path, each in found.items() if step is None or each.progress.steps <= step}


def _sum(parts: list[tuple[Path, int, float]]) -> dict[str, Tensor]:
    """Add up averages, in float64; in memory are the sum and one weight."""
    total: dict[str, Tensor] = {}
    for path, index, part in parts:
        for name, value in read_averages(path, index):
            total[name] = total.get(name, torch.zeros((), dtype=torch.float64)) + part * value.double()
    return {name: value.float() for name, value in total.items()}


def _target(run: Path, sigma_rel: float, step: int | None, out: str | None) -> Path:
    if out is None:
        at = "" if step is None else f"-step={step:08d}"
        return run / "checkpoints" / f"sigma_rel={sigma_rel:g}{at}.ckpt"
    target = Path(out) if out.endswith(".ckpt") else Path(out) / "checkpoints" / LAST
    if target.exists():
        raise ValueError(f"--out: '{target}' is there already, expected another name")
    return target


def _state(
    checkpoint: Checkpoint, last: Snapshot, average: dict[str, Tensor], sigma_rel: float
) -> dict[str, Any]:
    """Put averaged weights in the place of a checkpoint's own."""
    weights = checkpoint.state["state_dict"]
    if unknown := sorted(average.keys() - weights.keys()):
        raise ValueError(f"'{checkpoint.file}' has no weight {unknown[0]}, expected those of its snapshots")
    return {
        **header(),
        **{name: checkpoint.state[name] for name in KEPT if name in checkpoint.state},
        "state_dict": {**weights, **{name: average[name] for name in weights if name in average}},
        "progress": {"steps": last.progress.steps, "samples": last.progress.samples},
        "weights": f"average with sigma_rel {sigma_rel:g}",
    }

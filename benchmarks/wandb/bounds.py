"""What each configuration sends to W&B for 1,000 steps, by its settings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ldm.runs.recipe import CONFIGS, merged
from ldm.runs.trainer import VALIDATE_EVERY

ROW_BYTES = 800
"""More than any row took in `python -m benchmarks.wandb sends`."""
LEVELS, DENOISED, DRAWN = 6, 8, 16
"""Defaults of DenoisingGrid and SampleGrid."""


@dataclass(frozen=True)
class Bound:
    """What a run sends for a number of steps.

    Args:
        rows: Rows of training.
        validations: Validations, a row each.
        grids: Bytes of each image grid of a validation, as pixels of three bytes: PNG takes less.
    """

    rows: float
    validations: float
    grids: list[float]

    @property
    def bytes(self) -> float:
        """Bytes of rows and grids, at most; each grid has a row of its own."""
        rows = self.rows + self.validations * (1 + len(self.grids))
        return rows * ROW_BYTES + self.validations * sum(self.grids)


def bounds() -> Iterator[str]:
    """Yield a table for 1,000 steps of each configuration: rows, validations, grids, kilobytes at most."""
    yield "| configuration | rows of training | validations | grids | kB at most |"
    yield "|---|---|---|---|---|"
    for path in sorted(CONFIGS.rglob("*.yaml")):
        name = str(path.relative_to(CONFIGS).with_suffix(""))
        config = merged(name)
        if path.name.startswith("_") or not (config.get("trainer") or {}).get("max_steps"):
            continue
        found = bound(config, _image_size(name, config), 1000)
        grids = found.validations * len(found.grids)
        counts = f"{found.rows:.0f} | {found.validations:.2g} | {grids:.2g} | {found.bytes / 1000:,.0f}"
        yield f"| {name} | {counts} |"


def _image_size(name: str, config: dict[str, Any]) -> int:
    """Return the side of a configuration's images; of latents that of the autoencoder beside it."""
    found = config["data"].get("image_size")
    beside = f"{name.rpartition('/')[0]}/autoencoder"
    known = beside if (CONFIGS / f"{beside}.yaml").is_file() else "demo/autoencoder"
    return int(found or merged(known)["data"]["image_size"])


def bound(config: dict[str, Any], size: int, steps: int) -> Bound:
    """Return what a configuration sends.

    Args:
        config: The configuration, merged with what it builds on.
        size: Side of its images.
        steps: Optimizer steps.
    """
    base, trainer = merged("base")["trainer"], config["trainer"]
    every = trainer.get("val_check_interval") or min(VALIDATE_EVERY, trainer["max_steps"] // 10)
    every = every / trainer.get("accumulate_grad_batches", 1)
    rows = steps / trainer.get("log_every_n_steps", base["log_every_n_steps"])
    stage = str(config["model"]["class_path"]).rpartition(".")[2]
    pixels = 3.0 * size**2
    drawn = float((config.get("sample_grid") or {}).get("num", DRAWN))
    grids = {
        "Autoencoder": [2 * drawn * pixels],
        "Diffusion": [drawn * pixels, DENOISED * (1 + LEVELS) * pixels],
    }
    return Bound(rows, steps / every, grids.get(stage, []))

"""What each configuration sends to W&B for 1,000 steps, by its settings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ldm.runs.recipe import CONFIGS, merged
from ldm.runs.trainer import VALIDATE_EVERY

ROW_BYTES = 800
"""More than any row took in `python -m benchmarks.wandb sends`."""
LEVELS, DENOISED, DRAWN = 6, 8, 16
"""Defaults of DenoisingGrid and SampleGrid."""


def bounds() -> Iterator[str]:
    """Yield a table: rows of training and of validation, image grids, and kilobytes at most.

    A grid counts as its pixels, three bytes each: PNG takes less.
    """
    yield "| configuration | rows of training | validations | grids | kB at most |"
    yield "|---|---|---|---|---|"
    for path in sorted(CONFIGS.rglob("*.yaml")):
        name = str(path.relative_to(CONFIGS).with_suffix(""))
        config = merged(name)
        if path.name.startswith("_") or not (config.get("trainer") or {}).get("max_steps"):
            continue
        rows, validations, sizes = _counts(config, _image_size(name, config))
        kilobytes = (rows * ROW_BYTES + validations * (ROW_BYTES + sum(sizes))) / 1000
        grids = validations * len(sizes)
        yield f"| {name} | {rows:.0f} | {validations:.2g} | {grids:.2g} | {kilobytes:,.0f} |"


def _image_size(name: str, config: dict[str, Any]) -> int:
    """Return the side of a configuration's images; of latents that of the autoencoder beside it."""
    found = config["data"].get("image_size")
    beside = f"{name.rpartition('/')[0]}/autoencoder"
    known = beside if (CONFIGS / f"{beside}.yaml").is_file() else "demo/autoencoder"
    return int(found or merged(known)["data"]["image_size"])


def _counts(config: dict[str, Any], size: int) -> tuple[float, float, list[float]]:
    """Return rows and validations for 1,000 steps, and the bytes of each grid of a validation."""
    base, trainer = merged("base")["trainer"], config["trainer"]
    every = trainer.get("val_check_interval") or min(VALIDATE_EVERY, trainer["max_steps"] // 10)
    every = every / trainer.get("accumulate_grad_batches", 1)
    rows = 1000 / trainer.get("log_every_n_steps", base["log_every_n_steps"])
    stage = str(config["model"]["class_path"]).rpartition(".")[2]
    pixels = 3.0 * size**2
    drawn = float((config.get("sample_grid") or {}).get("num", DRAWN))
    grids = {
        "Autoencoder": [2 * drawn * pixels],
        "Diffusion": [drawn * pixels, DENOISED * (1 + LEVELS) * pixels],
    }
    return rows, 1000 / every, grids.get(stage, [])

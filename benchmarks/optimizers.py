"""Muon beside AdamW on one transformer, equally tuned, in the latents that ``make demo`` leaves.

``python -m benchmarks.optimizers`` trains the transformer of demo/dit with batches of 32 on one core. Each
optimizer's learning rate is chosen among powers of two, by runs of full length: a rate that wins short runs
may lose long ones. Three are tried first, then further ones while the best is the last of them. Everything
but optimizer and rate is equal: warm-up of a tenth of the run, cosine decay, weight decay, average, seed.
Repeated, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from benchmarks.recipes import charged

HERE = Path("runs/optimizers")
RATES = {"AdamW": 2.0**-8, "Muon": 2.0**-7}
"""Learning rates with which tuning begins."""
VALIDATIONS = 10
"""In a run, evenly spread."""


def train(optimizer: str, lr: float, steps: int) -> dict[int, float]:
    """Train unless that is done; return the validation losses after so many steps."""
    run, every = HERE / f"{optimizer}-{lr:.3g}-{steps}", steps // VALIDATIONS
    settings = f"{{lr: {lr}, warmup: {steps // 10}, weight_decay: 0.01}}"
    charged(
        [
            *("ldm.fit", "--config=demo/dit", f"--run={run}", "--wandb.mode=disabled"),
            f"--model.init_args.optimizer={{class_path: {optimizer}, init_args: {settings}}}",
            *(f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={every}"),
            *("--trainer.callbacks=[]", "--data.batch_size=32", "--ema.decay=0.98"),
        ]
    )
    with (run / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["val/loss"]]
    return {int(row["step"]) + 1: float(row["val/loss"]) for row in rows}


def tuned(first: float, loss: Callable[[float], float]) -> dict[float, float]:
    """Find the least loss among powers of two of a rate.

    Args:
        first: The rate in the middle of the first three.
        loss: Gives the loss of a rate.

    Returns:
        Losses by rate, the least with larger ones on both sides.
    """
    losses = {rate: loss(rate) for rate in (first / 2, first, first * 2)}
    while (best := min(losses, key=losses.__getitem__)) in (min(losses), max(losses)):
        rate = best / 2 if best == min(losses) else best * 2
        losses[rate] = loss(rate)
    return dict(sorted(losses.items()))


def final(optimizer: str, steps: int, lr: float) -> float:
    """Return the validation loss at the end of a run; infinite if it diverged."""
    loss = train(optimizer, lr, steps)[steps]
    print(f"{optimizer} {lr:.3g}: {loss:.4f}", flush=True)
    return loss if math.isfinite(loss) else math.inf


def draw(curves: dict[str, dict[int, float]], path: Path) -> None:
    """Draw validation losses over optimizer steps."""
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(6, 4), layout="constrained")).add_subplot(
        xlabel="optimizer steps", ylabel="validation loss"
    )
    for name, losses in curves.items():
        axes.plot(list(losses), list(losses.values()), marker="o", label=name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=100)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.optimizers", description=__doc__)
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps of a run (default: 1,000)")
    steps = parser.parse_args(arguments).steps
    tables, curves = {}, {}
    for name, first in RATES.items():
        tables[name] = tuned(first, partial(final, name, steps))
        best = min(tables[name], key=tables[name].__getitem__)
        curves[f"{name}, learning rate {best:.3g}"] = train(name, best, steps)
    (HERE / "losses.json").write_text(json.dumps({"last": tables, "curves": curves}, indent=1))
    draw(curves, HERE / "curve.png")
    for name, losses in tables.items():
        print(f"{name}: " + ", ".join(f"{lr:.3g}: {loss:.4f}" for lr, loss in losses.items()))
    print("| steps | " + " | ".join(curves) + " |\n|---" + "|---" * len(curves) + "|")
    for step in next(iter(curves.values())):
        print(f"| {step} | " + " | ".join(f"{losses[step]:.4f}" for losses in curves.values()) + " |")
    print(f"curve: {HERE / 'curve.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Pack, train, draw, measure, report; a call that was interrupted is repeated where it stopped."""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.demo import measure
from benchmarks.demo.forecast import announcement, forecast
from benchmarks.demo.report import Times, table, write_report
from benchmarks.demo.steps import Plan, encode_latents, pack_shapes, tiny, train
from ldm.io.images import grid, write_png
from ldm.stages.autoencoder import Autoencoder
from ldm.stages.diffusion import Diffusion
from ldm.stages.load import CLIPTower, load_stage

GRID_SIZE = 64
HELP = """From nothing to a text-to-image model: pack captioned shapes, train an autoencoder, a CLIP and a
latent diffusion model, draw captions that training never showed, and measure. How long this machine needs is
measured first, and said. Repeated, it continues where it stopped."""


def demo(plan: Plan) -> dict[str, float]:
    """Run everything, print the table, and return the figures."""
    times = Times(plan.runs / "times.json")
    _once(times, "pack", lambda: pack_shapes(plan))
    _add(times, train(plan, "autoencoder", "clip"))
    _once(times, "encode", lambda: encode_latents(plan))
    _add(times, train(plan, "diffusion"))
    figures = _measure(plan, times)
    figures |= times.figures()
    write_report(plan.runs / "report.json", figures)
    print(f"\n{table(figures)}")
    print(f"images: {plan.runs / 'samples.png'}   figures: {plan.runs / 'report.json'}")
    return figures


def _measure(plan: Plan, times: Times) -> dict[str, float]:
    """Draw the unseen captions and measure all three stages."""
    autoencoder = load_stage(str(plan.run("autoencoder")), Autoencoder)
    diffusion = load_stage(str(plan.run("diffusion")), Diffusion)
    clip, size = CLIPTower(str(plan.run("clip"))), plan.packing.size
    novel = measure.load(plan.pattern("novel"), plan.num_novel, size)
    pairs = measure.load(plan.pattern("pairs"), plan.num_pairs, size)
    with _timed(times, "sample"):
        images = {
            name: measure.drawn(diffusion, b["text"]) for name, b in (("novel", novel), ("pairs", pairs))
        }
    with _timed(times, "measure"):
        val = measure.load(plan.pattern("val"), plan.packing.val, size)
        scenes = measure.load(plan.pattern("pairs"), plan.num_scenes, size)
        figures = {
            "autoencoder": measure.of_autoencoder(autoencoder, val),
            "clip": measure.of_clip(clip, scenes),
            "novel": measure.read_back(images["novel"], novel["text"])
            | measure.of_images(images["novel"], novel, clip),
            "pairs": measure.read_back(images["pairs"], pairs["text"]),
        }
    captions = "\n".join(novel["text"][:GRID_SIZE])
    write_png(
        plan.runs / "samples.png", grid(images["novel"][:GRID_SIZE]), {"captions": captions, "seed": "0"}
    )
    return {f"{part}/{name}": value for part, values in figures.items() for name, value in values.items()}


@contextlib.contextmanager
def _timed(times: Times, step: str) -> Iterator[None]:
    begun = time.monotonic()
    yield
    times.set(step, time.monotonic() - begun)


def _once(times: Times, step: str, action: Callable[[], None]) -> None:
    """Run a step that does nothing when it is repeated: then its first time counts."""
    print(f"[{step}]", flush=True)
    begun = time.monotonic()
    action()
    if times.seconds.get(step, 0.0) < (seconds := time.monotonic() - begun):
        times.set(step, seconds)


def _add(times: Times, seconds: dict[str, float]) -> None:
    for stage, spent in seconds.items():
        times.add(stage, spent)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=HELP)
    parser.add_argument("--tiny", action="store_true", help="the whole chain in miniature, under a minute")
    parser.add_argument("--folder", type=Path, help="where --tiny works (default: a temporary folder)")
    options = parser.parse_args(arguments)
    if not options.tiny:
        plan = Plan()
        print(announcement(forecast(plan.cores)), flush=True)
        demo(plan)
        return 0
    with tempfile.TemporaryDirectory() as temporary, contextlib.chdir(options.folder or temporary):
        demo(tiny())
    return 0


if __name__ == "__main__":
    sys.exit(main())

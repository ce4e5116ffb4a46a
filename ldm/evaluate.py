"""Measure checkpoints and pictures: ``python -m ldm.evaluate --checkpoint RUN --data SHARDS``."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import cast

import torch
from jsonargparse import ArgumentParser, Namespace
from torch.utils.data import Dataset

import ldm.diffusion.samplers.ddim
import ldm.diffusion.samplers.ddpm
import ldm.diffusion.samplers.dpm_solver
import ldm.diffusion.samplers.euler
import ldm.diffusion.samplers.heun
import ldm.diffusion.samplers.plms
import ldm.diffusion.samplers.unipc
import ldm.stages.autoguidance  # noqa: F401  (imported, they can be named without their module)
from ldm import checkpoint as ckpt
from ldm.candidates import PRECISIONS, Candidate, Drawn, Read, Real, Repeated, Share
from ldm.cli import check_at_least, command_parser, default_device, run_command
from ldm.data.decode import Sample
from ldm.diffusion.guidance import ClassifierFree
from ldm.diffusion.samplers.sampler import Sampler
from ldm.metrics.clip_score import CLIPScore
from ldm.metrics.feature_metrics import FeatureMetrics
from ldm.metrics.frechet import Frechet
from ldm.metrics.inception import Inception
from ldm.metrics.inception_score import InceptionScore
from ldm.metrics.kernel import CMMD, KID
from ldm.metrics.lpips import LPIPS
from ldm.metrics.measure import Measure
from ldm.metrics.measurement import Measurement
from ldm.metrics.metric import Metric, Reals, Says
from ldm.metrics.neighbours import Neighbours
from ldm.metrics.psnr import PSNR
from ldm.metrics.retrieval import Retrieval
from ldm.metrics.ssim import SSIM
from ldm.metrics.towers import Towers
from ldm.metrics.zero_shot import TEMPLATES, ZeroShot
from ldm.processes import processes
from ldm.real_pictures import RealPictures, open_shards, real_pictures
from ldm.report import Result, plot, slug, table, write_json, write_npz
from ldm.stages.load import CLIPTower, load_stage
from ldm.stages.stage import Stage
from ldm.types import Generates

HELP = """Measure what checkpoints draw, or pictures of a folder, against real pictures.

  python -m ldm.evaluate --checkpoint runs/demo/diffusion --data "shards/shapes/val-*.tar" \\
    --clip runs/demo/clip --guidance 1 2 3 5
  python -m ldm.evaluate --pictures samples --reference VIRTUAL_imagenet256.npz --inception inception.pth
  torchrun --nproc-per-node 8 -m ldm.evaluate ...

Several checkpoints or folders, --sampler, --steps and --guidance give a row each. Writes evaluation.json,
each number with its record, and curve.png, distance against CLIP score, into --out. Pictures do not depend on
the number of processes. A checkpoint may also be of an autoencoder (PSNR, SSIM, rFID) or CLIP (retrieval,
and with --classes zero-shot accuracy)."""


def parser() -> ArgumentParser:
    """Describe the command line."""
    parser = command_parser("ldm.evaluate", HELP)
    add = parser.add_argument
    add("--checkpoint", type=str, nargs="+", default=[], help="Run folders or .ckpt files.")
    add("--pictures", type=str, nargs="+", default=[], help="Folders, or .npz files with arr_0.")
    add("--data", type=str | None, help="Shards with real pictures, and with what is drawn for.")
    add("--reference", type=str | None, help="Folder or .npz (ADM) to compare with instead of --data.")
    add("--num-pictures", type=int | None, help="Pictures per candidate; default: one for each sample.")
    add("--inception", type=str | None, help="Inception weights of torch-fidelity: FID, sFID, IS, KID ...")
    add("--clip", type=str | None, help="Run folder of a CLIP: CLIP score, CMMD, distance of its features.")
    add("--lpips", type=str | None, help="AlexNet weights of torchvision: LPIPS of an autoencoder.")
    add("--classes", type=str | None, help="File of class names, in the order of the labels of --data.")
    add("--templates", type=str | None, help="File of captions with {} for them; default: " + TEMPLATES[0])
    add("--metrics", type=list[Metric], default=[], sub_configs=True, help="YAML file of further metrics.")
    add(
        "--sampler",
        type=Sampler | list[Sampler] | None,
        help='DDIM, DDPM, DPMSolver or a class path, or several: "[DDIM, UniPC]"; default: as trained.',
    )
    add("--steps", type=int, nargs="+", default=[], help="Steps of the sampler; default: as trained.")
    add("--guidance", type=float, nargs="+", default=[], help="Scales of guidance; default: as trained.")
    add("--seed", type=int, default=0, help="Seed of the random numbers.")
    add("--precision", type=str, default="32-true", help="Of drawing: " + ", ".join(PRECISIONS) + ".")
    add("--size", type=int | None, help="Side of the pictures in pixels; default: as trained.")
    add("--batch-size", type=int, default=64, help="Pictures drawn at once on each process.")
    add("--num-workers", type=int, default=0, help="Further processes that read and decode, for each one.")
    add("--device", type=str, default=default_device(), help="cpu, cuda, cuda:1 ...")
    add("--save-pictures", action="store_true", help="Write an .npz per candidate that ADM's program reads.")
    add("--out", type=str, default="evaluation", help="Folder for what is written.")
    return parser


def evaluate(arguments: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        arguments: The command line; None takes that of the process.

    Raises:
        ValueError: If a metric failed; what the others found is written all the same.
    """
    command = parser()
    options = command.parse_args(arguments)
    check(options)
    objects = command.instantiate(options)
    with processes(options.device) as (group, where):
        share = Share(group.rank, group.world, options.batch_size, where, options.num_workers)
        found = [load_stage(path, Stage).to(where) for path in options.checkpoint]  # type: ignore[type-abstract]
        size = options.size or next((stage.image_size for stage in found if stage.image_size), None)
        samples = open_shards(options.data, size) if options.data else None
        real = real_pictures(options.reference, options.data, samples, size)
        metrics = [*objects.metrics, *chosen_metrics(options, found, real)]
        candidates = list(chosen_candidates(options, found, samples, listed(objects.sampler)))
        failures: list[str] = []
        results = []
        for candidate in candidates:
            measurement = Measurement([*metrics, *candidate.metrics], group, where)
            results.append(measure(candidate, measurement, share, real, options))
            failures += measurement.failures
        if group.rank == 0:
            finish(Path(options.out), results)
    if failures:
        raise ValueError("; ".join(dict.fromkeys(failures)))


def check(options: Namespace) -> None:
    """Check what the options say together.

    Raises:
        ValueError: If they do not fit.
    """
    check_at_least("--batch-size", options.batch_size, 1)
    check_at_least("--num-workers", options.num_workers, 0)
    if options.num_pictures is not None:
        check_at_least("--num-pictures", options.num_pictures, 2)
    for steps in options.steps:
        check_at_least("--steps", steps, 1)
    if options.precision not in PRECISIONS:
        raise ValueError(f"--precision: got {options.precision}, expected one of {', '.join(PRECISIONS)}")
    if not options.checkpoint and not options.pictures:
        raise ValueError("got neither --checkpoint nor --pictures, expected one of them at least")
    if options.checkpoint and not options.data:
        raise ValueError("--data: got none, expected shards with what --checkpoint draws for")
    if not options.data and not options.reference:
        raise ValueError("got neither --data nor --reference, expected real pictures to compare with")


def chosen_metrics(options: Namespace, stages: Sequence[Stage], real: RealPictures) -> Iterator[Metric]:
    """Yield the metrics that the options and the stages ask for.

    Raises:
        ValueError: If that is none.
    """
    kinds = {stage.name for stage in stages}
    if options.inception:
        measures = [Frechet(), Frechet("spatial", "sfid"), InceptionScore(), KID(), Neighbours()]
        yield FeatureMetrics(Inception(options.inception), measures, real.statistics)
    if options.clip:
        of_text: list[Measure] = [CLIPScore()] if stages else []
        against: list[Measure] = [] if real.samples is None else [Frechet(), CMMD()]
        yield FeatureMetrics(Towers(CLIPTower(options.clip)), [*against, *of_text])
    if "autoencoder" in kinds:
        yield from (PSNR(), SSIM())
    if options.lpips:
        yield LPIPS(options.lpips)
    asked = options.inception or options.clip or options.lpips or options.metrics
    if not asked and not kinds & {"autoencoder", "clip"}:
        raise ValueError("got no metric, expected --inception, --clip, --lpips or --metrics")


def chosen_candidates(
    options: Namespace,
    stages: Sequence[Stage],
    samples: Dataset[Sample] | None,
    samplers: Sequence[Sampler],
) -> Iterator[Candidate]:
    """Yield what is measured: each checkpoint in each setting, then each folder."""
    for path, stage in zip(options.checkpoint, stages, strict=True):
        assert samples is not None
        wanted = Repeated(samples, options.num_pictures or len(samples))  # type: ignore[arg-type]
        origin: Says = {"checkpoint": path, "checkpoint_sha256": ckpt.sha256(path), "weights": _weights(path)}
        if not isinstance(stage, Generates):
            yield Real(wanted, origin, list(clip_metrics(options, path, samples)))
            continue
        for label, parts in settings(options, stage, samplers):
            name = f"{path} {label}".strip()
            yield Drawn(name, stage, parts, wanted, options.seed, options.precision, origin)
    for path in options.pictures:
        yield Read(path, options.num_pictures)


def clip_metrics(options: Namespace, path: str, samples: Dataset[Sample]) -> Iterator[Metric]:
    """Yield what a CLIP is measured with: captions if there are any, classes if they are named."""
    clip = CLIPTower(path)
    if "text" in samples[0] or not options.classes:
        yield FeatureMetrics(Towers(clip), [Retrieval()])
    if options.classes:
        yield ZeroShot(clip, options.classes, options.templates or TEMPLATES)


def settings(
    options: Namespace, stage: Stage, samplers: Sequence[Sampler]
) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield every combination of sampler, steps and guidance, with a label."""
    if not hasattr(stage, "sampler"):
        yield "", {}
        return
    chosen = samplers or [cast(Sampler, stage.sampler)]
    for sampler, steps, scale in product(chosen, options.steps or [None], options.guidance or [None]):
        mine = copy.copy(sampler)
        parts: dict[str, object] = {"sampler": mine}
        label = [f"sampler={type(mine).__name__}"] if len(samplers) > 1 else []
        if steps is not None:
            set_steps(mine, steps)
            label.append(f"steps={steps}")
        if scale is not None:
            parts["guidance"] = ClassifierFree(scale)
            label.append(f"guidance={scale:g}")
        yield " ".join(label), parts


def listed(found: Sampler | list[Sampler] | None) -> list[Sampler]:
    """Make a list of what --sampler gave."""
    return found if isinstance(found, list) else [found] if found is not None else []


def set_steps(sampler: object, steps: int) -> None:
    """Change a sampler's number of steps.

    Raises:
        ValueError: If it has none to change.
    """
    if not hasattr(sampler, "num_steps"):
        raise ValueError(f"--steps: got {steps}, but {type(sampler).__name__} takes all that it trains")
    sampler.num_steps = steps


def measure(
    candidate: Candidate, run: Measurement, share: Share, real: RealPictures, options: Namespace
) -> Result:
    """Measure one candidate; its pictures are written if they are asked for."""
    run.begin(Reals(real.identity))
    if run.wants_real and real.samples is None:
        raise ValueError(f"--reference: '{real.statistics}' has no pictures 'arr_0', which --metrics need")
    for batch in share.batches(real.samples) if run.wants_real and real.samples is not None else ():
        run.see(batch)
    kept = []
    for batch, images in candidate.pictures(share):
        if real.size not in (None, images.shape[-1]):
            raise ValueError(
                f"{candidate.name}: its pictures have side {images.shape[-1]}, the real ones {real.size}: "
                "bring both to one size, for resizing changes every number"
            )
        run.update(images, batch)
        if options.save_pictures:
            kept.append((batch["place"], ((images + 1.0) * 127.5).round().to(torch.uint8).cpu()))
    values = run.compute()
    if options.save_pictures:
        _save(Path(options.out) / f"{slug(candidate.name)}.npz", kept, run)
    run.end()
    series = candidate.name.split(" guidance=")[0]
    return Result(candidate.name, series, candidate.says(), values)


def finish(out: Path, results: list[Result]) -> None:
    """Print the table, write evaluation.json and the curve."""
    write_json(out / "evaluation.json", results)
    print(table(results))
    drawn = plot(out / "curve.png", results)
    print(f"{out / 'evaluation.json'}" + (f" and {out / 'curve.png'}" if drawn else ""))


def _weights(path: str) -> str:
    return str(ckpt.peek(path).get("weights", "raw"))


def _save(path: Path, kept: list[tuple[torch.Tensor, torch.Tensor]], run: Measurement) -> None:
    places = run.group.collect(torch.cat([place for place, _ in kept]) if kept else torch.empty(0).long())
    size = kept[0][1].shape[-1] if kept else 0
    rows = torch.cat([images.flatten(1) for _, images in kept]) if kept else torch.empty(0).byte()
    rows = run.group.collect(rows)
    if run.group.rank == 0:
        pictures = rows[places.argsort()].view(len(places), 3, -1, size).permute(0, 2, 3, 1).contiguous()
        write_npz(path, pictures, run, size)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(lambda: evaluate(arguments))


if __name__ == "__main__":
    sys.exit(main())

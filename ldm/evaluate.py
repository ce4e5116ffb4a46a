"""Measure checkpoints and images: ``python -m ldm.evaluate --checkpoint RUN --data SHARDS``."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt, restricted_number_type

import ldm.sampling.autoguidance  # noqa: F401  (imported, it can be named without its module)
from ldm.cli import command_parser, default_device, run_command
from ldm.data.evaluation_set import EvaluationSet
from ldm.data.filters import Filter
from ldm.diffusion.guidance import Guidance
from ldm.diffusion.samplers.sampler import Sampler
from ldm.distributed.launch import processes
from ldm.evaluation.captions import TruncatedCaptions, readers
from ldm.evaluation.kind import image_kind
from ldm.evaluation.plan import (
    Sweep,
    TrainedStage,
    build_metrics,
    build_sources,
    check_negative_prompt,
    check_stages,
    load_trained,
)
from ldm.evaluation.reference import ReferenceImages, open_shards, real_images
from ldm.evaluation.report import OutputFolder, Result, plot, slug, table, write_json, write_npz
from ldm.evaluation.session import Measurement
from ldm.evaluation.sources import PRECISIONS, ImageSource, RankSubset
from ldm.hardware import explaining_memory, warn_of_emulation
from ldm.io.images import LEVELS, to_levels
from ldm.io.pins import pinned, pins
from ldm.io.stderr import plain_warnings
from ldm.io.upstream import OPTION, upstream_options
from ldm.metrics.metric import Metadata, Metric, ReferenceInfo
from ldm.metrics.zero_shot import TEMPLATES
from ldm.stage_protocols import HasClasses, ReadsFields
from ldm.types import ImageKind

HELP = """Measure what checkpoints draw, or images of a folder, against real images.

  python -m ldm.evaluate --checkpoint runs/demo/diffusion --data "shards/shapes/val-*.tar" \\
    --clip runs/demo/clip --guidance 1 2 3 5
  python -m ldm.evaluate --images samples --reference VIRTUAL_imagenet256.npz --inception inception.pth
  torchrun --nproc-per-node 8 -m ldm.evaluate ...

Several checkpoints or folders, --sampler, --steps and --guidance give a row each. Writes evaluation.json,
each number with its record, and curve.png, distance against CLIP score, into --out; files of an earlier call
there are renamed. Images do not depend on
the number of processes. A checkpoint may also be of an autoencoder (PSNR, SSIM, rFID) or CLIP (retrieval,
and with --classes zero-shot accuracy)."""


AtLeastTwo = restricted_number_type("AtLeastTwo", int, (">=", 2))


def parser() -> ArgumentParser:
    """Describe the command line."""
    parser = command_parser("ldm.evaluate", HELP)
    add = parser.add_argument
    add(
        "--checkpoint", type=str, nargs="+", default=[], help="Run folders, .ckpt files, wandb:... artifacts."
    )
    add("--upstream", **OPTION)
    add("--images", type=str, nargs="+", default=[], help="Folders, or .npz files with arr_0.")
    add("--data", type=str | None, help="Shards with real images, and with what is drawn for.")
    add(
        "--filter", type=str | None, help="Samples of --data that are used, as data.val_filter; default: all."
    )
    add("--index-dir", type=str | None, help="Folder of the indices; default: beside the shards, or a cache.")
    add("--reference", type=str | None, help="Folder or .npz (ADM) to compare with instead of --data.")
    add("--num-images", type=AtLeastTwo | None, help="Images per candidate; default: one for each sample.")
    add("--inception", type=str | None, help="Inception weights of torch-fidelity: FID, sFID, IS, KID ...")
    add("--clip", type=str | None, help="Run folder of a CLIP: CLIP score, CMMD, distance of its features.")
    add("--lpips", type=str | None, help="AlexNet weights of torchvision: LPIPS of an autoencoder.")
    add("--classes", type=str | None, help="File of class names, in the order of the labels of --data.")
    add("--templates", type=str | None, help="File of captions with {} for them; default: " + TEMPLATES[0])
    add("--metrics", type=list[Metric], default=[], sub_configs=True, help="YAML file of further metrics.")
    _add_drawing(parser)
    add("--batch-size", type=PositiveInt, default=64, help="Images drawn at once on each process.")
    add(
        "--num-workers",
        type=NonNegativeInt,
        default=0,
        help="Further processes that read and decode, for each one.",
    )
    add("--device", type=str, default=default_device(), help="cpu, cuda, cuda:1 ...")
    add("--cache", type=str | None, help="Folder for statistics of real images, which later calls find.")
    add("--save-images", action="store_true", help="Write an .npz per candidate that ADM's program reads.")
    add("--out", type=str, default="evaluation", help="Folder for what is written.")
    return parser


def _add_drawing(parser: ArgumentParser) -> None:
    """Add how a diffusion stage draws."""
    add = parser.add_argument
    add(
        "--sampler",
        type=Sampler | list[Sampler] | None,
        help='DDIM, DDPM, DPMSolver or a class path, or several: "[DDIM, UniPC]"; default: as trained.',
    )
    add("--steps", type=PositiveInt, nargs="+", default=[], help="Steps of the sampler; default: as trained.")
    add(
        "--guidance",
        type=float | Guidance,
        nargs="+",
        default=[],
        help="Scales of classifier-free guidance, or classes: "
        '\'{"class_path": "Rescaled", "init_args": {"scale": 3}}\'; default: as trained.',
    )
    add(
        "--negative-prompt",
        type=str | None,
        help="Caption to guide away from, instead of the empty one, where guidance uses one.",
    )
    add("--seed", type=int, default=0, help="Seed of the random numbers.")
    add("--precision", type=Literal[tuple(PRECISIONS)], default="32-true", help="Of drawing.")
    add("--size", type=PositiveInt | None, help="Side of the images in pixels; default: as trained.")
    add("--image", type=ImageKind | None, help="Kind of the images, --image.channels 1; default: as trained.")


@explaining_memory("a smaller --batch-size", "--device cpu")
def evaluate(arguments: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        arguments: The command line; None takes that of the process.

    Raises:
        ValueError: If a metric failed, or a candidate could not be measured; what else was found is written.
    """
    command = parser()
    options = command.parse_args(arguments)
    check(options)
    with processes(options.device) as (group, where):
        options = pinned(options, group.broadcast(pins(options) if group.rank == 0 else {}))
        objects = command.instantiate(options)
        subset = RankSubset(group.rank, group.world, options.batch_size, where, options.num_workers)
        if group.rank == 0 and (warning := warn_of_emulation("--precision", options.precision, where)):
            print(warning, file=sys.stderr, flush=True)
        with upstream_options(options.upstream):
            stages = [load_trained(path, where) for path in options.checkpoint]
        check_stages(options, stages)
        sweep = Sweep(listed(objects.sampler), options.steps, objects.guidance, options.negative_prompt)
        check_negative_prompt(sweep, stages)
        size = options.size or next((each.stage.image_size for each in stages if each.stage.image_size), None)
        reads = [
            name for each in stages if isinstance(each.stage, ReadsFields) for name in each.stage.reads(())
        ]
        kind = image_kind({each.path: each.stage.image_kind for each in stages}, objects.image)
        options.image = kind
        samples = real_samples(options, size, reads, classes_of(stages))
        real = real_images(options.reference, samples, size, kind)
        metrics = build_metrics(options, objects.metrics, stages, real)
        out, results = OutputFolder(Path(options.out)), list[Result]()
        failures: list[str] = []
        try:
            for source in build_sources(options, stages, samples, sweep, metrics):
                measurement = Measurement(source.metrics, group, where)
                results.append(measure(source, measurement, subset, real, options, out, samples))
                failures += measurement.failures
                if group.rank == 0:
                    write_json(out.path("evaluation.json"), results, is_complete=False)
            if group.rank == 0:
                write_json(out.path("evaluation.json"), results, is_complete=True)
        finally:
            if group.rank == 0 and results:
                finish(out, results)
    if failures:
        raise ValueError("; ".join(dict.fromkeys(failures)))


def check(options: Namespace) -> None:
    """Check the combination of options.

    Raises:
        ValueError: If they do not fit.
    """
    if not options.checkpoint and not options.images:
        raise ValueError("got neither --checkpoint nor --images, expected one of them at least")
    if options.checkpoint and not options.data:
        raise ValueError("--data: got none, expected shards with what --checkpoint draws for")
    if not options.data and not options.reference:
        raise ValueError("got neither --data nor --reference, expected real images to compare with")
    if options.filter is not None and not options.data:
        raise ValueError("--filter: got one, but no --data whose samples it chooses among")


def real_samples(
    options: Namespace, size: int | None, reads: Sequence[str], classes: Mapping[str, int]
) -> EvaluationSet | None:
    """Open --data; None without it."""
    if options.data is None:
        return None
    kept = None if options.filter is None else Filter(options.filter, "--filter")
    return open_shards(options.data, size, reads, classes, kept, options.index_dir, options.image)


def classes_of(stages: Sequence[TrainedStage]) -> dict[str, int]:
    """Count the classes of each field that all stages know."""
    found: dict[str, int] = {}
    for each in stages:
        if isinstance(each.stage, HasClasses):
            found |= {name: min(n, found.get(name, n)) for name, n in each.stage.classes.items()}
    return found


def listed(found: Sampler | list[Sampler] | None) -> list[Sampler]:
    """Make a list of what --sampler gave."""
    return found if isinstance(found, list) else [found] if found is not None else []


def measure(
    source: ImageSource,
    run: Measurement,
    subset: RankSubset,
    real: ReferenceImages,
    options: Namespace,
    out: OutputFolder,
    samples: EvaluationSet | None = None,
) -> Result:
    """Measure one candidate; its images are written with --save-images.

    Raises:
        ValueError: If its images cannot be compared with the real ones.
    """
    size = source.size
    if real.size not in (None, size):
        raise ValueError(
            f"{source.name}: its images have side {size}, the real ones {real.size}: "
            "bring both to one size, for resizing changes every number"
        )
    cache = Path(options.cache) if options.cache else None
    run.begin(ReferenceInfo(real.identity, cache, size, real.fingerprint))
    if run.needs_real and real.samples is None:
        raise ValueError(f"--reference: '{real.statistics}' has no images 'arr_0', which --metrics need")
    for batch in subset.batches(real.samples) if run.needs_real and real.samples is not None else ():
        run.update_real(batch)
    kept, captions = [], TruncatedCaptions(readers("the model", source.context_length, source.metrics))
    for batch, images in source.images(subset) if run.is_alive else ():
        run.update(images, batch)
        captions.add(batch)
        if options.save_images:
            kept.append((batch["index"], to_levels(images, options.image.bits).cpu()))
    values = run.compute()
    if options.save_images:
        _save(out, f"{slug(source.name)}.npz", kept, run, options.image)
    run.end()
    chosen: Metadata = {} if samples is None or samples.filter is None else {"filter": samples.filter}
    metadata = {**source.metadata(), "size": size, **chosen, **captions.metadata(run.group)}
    if run.group.rank == 0 and (warning := captions.warning()) is not None:
        print(f"{source.name}: {warning}", file=sys.stderr, flush=True)
    return Result(source.name, source.series, metadata, values)


def finish(out: OutputFolder, results: list[Result]) -> None:
    """Print the table, and draw the curve."""
    print(table(results))
    numbers, curve = out.path("evaluation.json"), out.path("curve.png")
    print(f"{numbers} and {curve}" if plot(curve, results) else f"{numbers}")


def _save(
    out: OutputFolder,
    name: str,
    kept: list[tuple[torch.Tensor, torch.Tensor]],
    run: Measurement,
    kind: ImageKind,
) -> None:
    indices = run.group.gather(torch.cat([index for index, _ in kept]) if kept else torch.empty(0).long())
    size = kept[0][1].shape[-1] if kept else 0
    rows = (
        torch.cat([images.flatten(1).view(torch.uint8) for _, images in kept])
        if kept
        else torch.empty(0).byte()
    )
    rows = run.group.gather(rows)
    if run.group.rank == 0:
        images = rows[indices.argsort()].view(LEVELS[kind.bits]).view(len(indices), kind.channels, -1, size)
        write_npz(out.path(name), images.permute(0, 2, 3, 1).contiguous(), run, size)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    with plain_warnings():
        return run_command(lambda: evaluate(arguments))


if __name__ == "__main__":
    sys.exit(main())

"""Draw images: ``python -m ldm.sample --checkpoint runs/demo/diffusion --prompt "a red circle"``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt, restricted_number_type
from torch import Tensor

import ldm.sampling.autoguidance  # noqa: F401  (imported, it can be named without its module)
from ldm import __version__
from ldm.cli import command_parser, default_device, run_command
from ldm.compiler import COMPILE_HELP, Compiled, InferenceCompiler
from ldm.data.buckets import Size
from ldm.data.fields import FIELDS
from ldm.diffusion.guidance import ClassifierFree, Guidance
from ldm.diffusion.samplers.sampler import Sampler
from ldm.hardware import (
    Inference,
    device,
    explaining_memory,
    inference_precision,
    warn_of_emulation,
)
from ldm.io.checkpoint import Checkpoint
from ldm.io.images import grid, write_png
from ldm.io.pins import pinned
from ldm.io.upstream import OPTION, upstream_options
from ldm.sampling.draw import Redraw, draw
from ldm.sampling.output import GRID, image_path, output_folder
from ldm.sampling.preview import Previewed, write_previews
from ldm.sampling.prompts import Prompt, read_in_chunks, read_prompt_file
from ldm.sampling.redraw import STRENGTH, redraw
from ldm.sampling.requests import (
    SampleOptions,
    as_batch,
    check_guidance,
    expand_requests,
    file_options,
)
from ldm.types import RGB8

if TYPE_CHECKING:
    from ldm.stages.diffusion import Diffusion

GRID_SIZE = 64
"""Images of the grid, at most."""
Strength = restricted_number_type("Strength", float, [(">", 0), ("<=", 1)])
HELP = """Draw images with a trained diffusion stage.

  python -m ldm.sample --checkpoint runs/demo/diffusion --prompt "a large red ring in the center"
  python -m ldm.sample --checkpoint runs/demo/diffusion --prompts prompts.txt --negative-prompt "blurred"
  python -m ldm.sample --checkpoint runs/demo/digits --labels 0 1 2 3 --num-per-prompt 8 --guidance 2

A model conditioned on images, maps or layouts gets them from files, or from the samples of shards:

  python -m ldm.sample --checkpoint runs/demo/semantic --label-map map.png
  python -m ldm.sample --checkpoint runs/demo/semantic --shards shards/shapes/val-000000.tar --num 16

Any other model redraws an image (--image, --strength), or only what --mask shows white:

  python -m ldm.sample --checkpoint runs/demo/diffusion --prompt "..." --image old.png --strength 0.6
  python -m ldm.sample --checkpoint runs/demo/diffusion --prompt "..." --image old.png --mask mask.png

Writes 000000.png ... and grid.png into --out; each file carries the settings that drew it in its text
chunks. The folder may have images of the same call, and no others. An image depends on its condition,
copy, seed, model and sampler, not on the others of the call."""


def parser() -> ArgumentParser:
    """Describe the command line."""
    parser = command_parser("ldm.sample", HELP)
    add = parser.add_argument
    add(
        "--checkpoint",
        type=str,
        required=True,
        help="Run folder, .ckpt or wandb:ENTITY/PROJECT/NAME:VERSION of a diffusion stage.",
    )
    add("--upstream", **OPTION)
    _add_subjects(parser)
    _add_conditions(parser)
    add(
        "--strength",
        type=Strength | None,
        help=f"How much of --image is redrawn, in (0, 1]; default: {STRENGTH}, with --mask 1.",
    )
    add(
        "--sampler",
        type=Sampler | None,
        help="DDIM, DPMSolver, Euler, ... or a class path; default: as trained.",
    )
    add("--steps", type=PositiveInt | None, help="Steps of the sampler; default: as trained.")
    add(
        "--guidance",
        type=float | Guidance | None,
        help="Scale of classifier-free guidance: 1 is none, more obeys prompts more; or Rescaled, Interval, "
        "Autoguidance; default: as trained.",
    )
    add("--seed", type=int, default=0, help="Seed of the random numbers.")
    add("--size", type=PositiveInt | None, help="Side of the images in pixels; default: as trained.")
    add("--height", type=PositiveInt | None, help="Height of the images in pixels; default: --size.")
    add("--width", type=PositiveInt | None, help="Width of the images in pixels; default: --size.")
    add("--batch-size", type=PositiveInt, default=64, help="Images drawn at once.")
    add(
        "--precision",
        type=Inference,
        default="auto",
        help="What networks compute in; auto: bf16 on a GPU that has it, else 32.",
    )
    add("--compile", type=Compiled, default="auto", help=COMPILE_HELP)
    add("--preview", type=PositiveInt | None, help="Write what is estimated so far every so many steps.")
    add("--device", type=str, default=default_device(), help="cpu, cuda, cuda:1 ...")
    add("--out", type=str | None, help="Folder for the images; default: samples, or samples-2 ...")
    return parser


def _add_subjects(parser: ArgumentParser) -> None:
    """Add what is drawn."""
    add = parser.add_argument
    add("--prompt", type=str, action="append", help="Caption to draw; may be repeated.")
    add(
        "--prompts", type=str | None, help="File with one caption per line, or .jsonl with negative ones too."
    )
    add(
        "--negative-prompt",
        type=str | None,
        help="Caption to guide away from, instead of the empty one; of all images without one of their own.",
    )
    add(
        "--long-prompts",
        type=Literal["cut", "chunks"],
        default="cut",
        help="What becomes of captions longer than the context of a CLIP text tower: cut, with a warning, or "
        "read in chunks of 75 tokens, whose tokens are all attended to.",
    )
    add("--labels", type=int, nargs="+", help="Class labels to draw.")
    add(
        "--num",
        type=PositiveInt | None,
        help="Number of images without caption and label, or of samples of --shards.",
    )
    add("--num-per-prompt", type=PositiveInt, default=1, help="Images of each prompt, label or sample.")


def _add_conditions(parser: ArgumentParser) -> None:
    """Add what a condition or a start is read from."""
    add = parser.add_argument
    add(
        "--shards",
        type=str | None,
        help="Shards whose samples are drawn: a path with braces or a glob.",
    )
    add("--index-dir", type=str | None, help="Folder of their indices; default: beside them, or a cache.")
    for name, option in file_options().items():
        add(option, dest=name, type=str | None, help=FIELDS[name].help)


def load_diffusion(checkpoint: Checkpoint, options: Namespace, objects: Namespace) -> Diffusion:
    """Load the model and apply what the command line changes.

    Args:
        checkpoint: Of the model.
        options: The command line.
        objects: The same with its classes instantiated.
    """
    from ldm.stages.diffusion import Diffusion  # here, so that --help does not import Lightning
    from ldm.stages.load import load_stage

    with upstream_options(options.upstream):
        stage = load_stage(checkpoint, Diffusion)
    stage.sampler = objects.sampler or stage.sampler
    if options.steps is not None:
        stage.sampler.num_steps = options.steps
    if (guidance := objects.guidance) is not None:
        stage.guidance = ClassifierFree(guidance) if isinstance(guidance, float | int) else guidance
    if options.long_prompts == "chunks":
        read_in_chunks(stage.conditioner)
    stage.image_size = options.size or stage.image_size
    stage.to(where := device(options.device))
    return stage.to(memory_format=torch.channels_last) if where.type == "cuda" else stage


def sample_size(stage: Diffusion, options: Namespace) -> Size:
    """Find height and width of the images to draw.

    Raises:
        ValueError: If they are not known, or cannot be halved often enough.
    """
    for name in ("size", "height", "width"):
        if (side := getattr(options, name)) is not None and side % stage.multiple:
            factor = stage.latents.factor
            raise ValueError(
                f"--{name}: got {side}, expected a multiple of {stage.multiple}: of the autoencoder's factor "
                f"{factor} times {stage.multiple // factor} of the network"
            )
    size = Size(options.height or stage.image_size or 0, options.width or stage.image_size or 0)
    if not (size.height and size.width):
        raise ValueError(
            f"--size: '{options.checkpoint}' does not record the size of its images, expected it here"
        )
    return size


def sample_options(options: Namespace) -> SampleOptions:
    """Collect the options that name what to draw."""
    files = {field: getattr(options, field) for field in file_options()}
    return SampleOptions(
        prompts=[
            *(Prompt(text) for text in options.prompt or ()),
            *(read_prompt_file(options.prompts) if options.prompts else ()),
        ],
        negative=options.negative_prompt,
        labels=options.labels or [],
        files={field: path for field, path in files.items() if path is not None},
        shards=options.shards,
        num=options.num,
        copies=options.num_per_prompt,
        index_dir=options.index_dir,
    )


def settings(
    stage: Diffusion, checkpoint: Checkpoint, options: Namespace, size: Size, start: Redraw | None
) -> dict[str, str]:
    """Record how images are drawn, for the text chunks of their files."""
    from ldm.evaluation.record import describe_sampling

    files = {field: getattr(options, field) for field in file_options()}
    return {
        **{name: str(value) for name, value in describe_sampling(stage).items()},
        "steps": str(stage.sampler.num_steps or stage.objective.schedule.num_steps),
        "seed": str(options.seed),
        "size": str(size.height if size.height == size.width else size),
        "precision": inference_precision(options.precision, stage.device),
        "checkpoint": options.checkpoint,
        "checkpoint_sha256": checkpoint.sha256,
        **{field: path for field, path in files.items() if path is not None},
        **({} if start is None else {"strength": str(start.strength)}),
        **({"long_prompts": "chunks"} if options.long_prompts == "chunks" else {}),
        "software": f"ldm {__version__}",
    }


@explaining_memory("a smaller --batch-size", "--precision bf16", "a smaller --size")
def sample(arguments: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        arguments: The command line; None takes that of the process.
    """
    command = parser()
    options = pinned(command.parse_args(arguments))
    checkpoint = Checkpoint.open(options.checkpoint, "diffusion")
    stage = load_diffusion(checkpoint, options, command.instantiate(options))
    reads = stage.conditioner.reads
    stage.sample_size = size = sample_size(stage, options)
    kind = stage.image_kind or RGB8
    requests = expand_requests(sample_options(options), reads, size, kind)
    stage.conditioner.check(as_batch(requests))
    start = redraw(options, reads, size, kind)
    metadata = settings(stage, checkpoint, options, size, start)
    texts = [{**each.metadata, **metadata} for each in requests]
    check_guidance(stage.guidance, requests)
    out = output_folder(options.out, texts)
    if options.preview is not None:
        show = write_previews(out, [each.key for each in requests], stage.latents.decode)
        stage.guidance = Previewed(stage.guidance, options.preview, show)
    first: list[Tensor] = []
    if options.precision == "bf16" and (
        warning := warn_of_emulation("--precision", "bf16-mixed", stage.device)
    ):
        print(warning, file=sys.stderr)
    compiler = InferenceCompiler(options.compile)
    images = draw(stage, requests, options.seed, options.batch_size, start, options.precision, compiler)
    for i, image in enumerate(images):
        write_png(image_path(out, i), image, texts[i])
        first += [image] if i < GRID_SIZE else []
    subjects = "\n".join(request.subject for request in requests[:GRID_SIZE])
    write_png(out / GRID, grid(torch.stack(first)), {"prompt": subjects, **metadata})
    print(f"{out}: {len(requests)} images, and {out / GRID}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(lambda: sample(arguments))


if __name__ == "__main__":
    sys.exit(main())

"""Draw pictures: ``python -m ldm.sample --checkpoint runs/demo/diffusion --prompt "a red circle"``."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from jsonargparse import ArgumentParser, Namespace
from torch import Tensor
from tqdm import tqdm

import ldm.diffusion.samplers.ddim
import ldm.diffusion.samplers.ddpm
import ldm.diffusion.samplers.dpm_solver
import ldm.diffusion.samplers.euler
import ldm.diffusion.samplers.heun
import ldm.diffusion.samplers.plms
import ldm.diffusion.samplers.unipc  # noqa: F401  (imported, they can be named without their module)
from ldm import checkpoint as ckpt
from ldm.cli import check_at_least, default_device, device, run_command, version
from ldm.diffusion.guidance import ClassifierFree
from ldm.diffusion.samplers.sampler import Sampler
from ldm.pictures import grid, to_bytes, write_png
from ldm.stages.diffusion import Diffusion
from ldm.stages.load import load_stage
from ldm.types import Batch

GRID_SIZE = 64
"""Pictures of the grid, at most."""
OPTIONS = {("text",): "--prompt or --prompts", ("label",): "--labels", (): "--num"}
HELP = """Draw pictures with a trained diffusion stage.

  python -m ldm.sample --checkpoint runs/demo/diffusion --prompt "a large red ring in the center"
  python -m ldm.sample --checkpoint runs/demo/digits --labels 0 1 2 3 --num-per-prompt 8 --guidance 2

Writes 000000.png ... and grid.png into --out; each file carries the settings that drew it in its text
chunks. A picture depends on prompt, copy, seed, model and sampler alone, not on the others of the call."""


@dataclass(frozen=True)
class Wish:
    """One picture to draw.

    Args:
        subject: What the model is conditioned on: a caption, a label, or None.
        copy: Number of the picture among those of the same subject.
    """

    subject: str | int | None
    copy: int

    @property
    def key(self) -> str:
        """Name that the picture's random numbers belong to."""
        return f"{self.subject}/{self.copy}"


def parser() -> ArgumentParser:
    """Describe the command line."""
    parser = ArgumentParser(prog="python -m ldm.sample", description=HELP, exit_on_error=False)
    parser.add_argument(
        "--checkpoint", type=str, required=True, help="Run folder or .ckpt of a diffusion stage."
    )
    parser.add_argument("--prompt", type=str, action="append", help="Caption to draw; may be repeated.")
    parser.add_argument("--prompts", type=str | None, help="File with one caption per line.")
    parser.add_argument("--labels", type=int, nargs="+", help="Class labels to draw.")
    parser.add_argument("--num", type=int | None, help="Number of pictures of an unconditional model.")
    parser.add_argument("--num-per-prompt", type=int, default=1, help="Pictures of each prompt or label.")
    parser.add_argument(
        "--sampler", type=Sampler | None, help="DDIM, DDPM, DPMSolver or a class path; default: as trained."
    )
    parser.add_argument("--steps", type=int | None, help="Steps of the sampler; default: as trained.")
    parser.add_argument(
        "--guidance",
        type=float | None,
        help="Scale of classifier-free guidance: 1 is none, more obeys prompts more; default: as trained.",
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of the random numbers.")
    parser.add_argument(
        "--size", type=int | None, help="Side of the pictures in pixels; default: as trained."
    )
    parser.add_argument("--batch-size", type=int, default=64, help="Pictures drawn at once.")
    parser.add_argument("--device", type=str, default=default_device(), help="cpu, cuda, cuda:1 ...")
    parser.add_argument("--out", type=str, default="samples", help="Folder for the pictures.")
    return parser


def load(options: Namespace, sampler: Sampler | None) -> Diffusion:
    """Load the model and set on it what the command line changes."""
    stage = load_stage(options.checkpoint, Diffusion).to(device(options.device))
    stage.sampler = sampler or stage.sampler
    if options.steps is not None:
        check_at_least("--steps", options.steps, 1)
        stage.sampler.num_steps = options.steps
    if options.guidance is not None:
        stage.guidance = ClassifierFree(options.guidance)
    if options.size is not None:
        check_at_least("--size", options.size, stage.latents.factor)
        stage.latents.shape(options.size)
        stage.image_size = options.size
    return stage


def wishes(options: Namespace, reads: tuple[str, ...]) -> list[Wish]:
    """List the pictures that the command line asks of a model that is conditioned on the fields ``reads``.

    Raises:
        ValueError: If it asks for nothing, or for what the model does not know.
    """
    subjects: dict[tuple[str, ...], list[str] | list[int] | list[None]] = {
        ("text",): (options.prompt or []) + _lines(options.prompts),
        ("label",): options.labels or [],
        (): [None] * (options.num or 0),
    }
    asked = [OPTIONS[fields] for fields, values in subjects.items() if values]
    if asked != [OPTIONS.get(reads)]:
        raise ValueError(
            f"the model of --checkpoint is conditioned on {' and '.join(reads) or 'nothing'}: got "
            f"{' and '.join(asked) or 'neither prompts nor labels nor a number'}, expected "
            f"{OPTIONS.get(reads, 'a model of text or labels alone')}"
        )
    check_at_least("--num-per-prompt", options.num_per_prompt, 1)
    copies: Counter[str | int | None] = Counter()
    result = []
    for subject in subjects[reads]:
        for _ in range(options.num_per_prompt):
            result.append(Wish(subject, copies[subject]))
            copies[subject] += 1
    return result


def draw(stage: Diffusion, wished: Sequence[Wish], seed: int, batch_size: int) -> Iterator[Tensor]:
    """Draw pictures one after the other, (3, H, W) uint8, with a progress bar."""
    with tqdm(total=len(wished), desc="sample", unit=" pictures", disable=len(wished) < 2) as bar:
        for start in range(0, len(wished), batch_size):
            batch = as_batch(wished[start : start + batch_size])
            if "label" in batch:
                batch["label"] = batch["label"].to(stage.device)
            images = to_bytes(stage.generate(batch, seed)).cpu()
            bar.update(len(images))
            yield from images


def as_batch(wished: Sequence[Wish]) -> Batch:
    """Put wishes of one kind into the form that stages know."""
    batch: Batch = {"key": [wish.key for wish in wished]}
    subjects = [wish.subject for wish in wished]
    if isinstance(subjects[0], str):
        batch["text"] = cast(list[str], subjects)
    elif isinstance(subjects[0], int):
        batch["label"] = torch.tensor(subjects)
    return batch


def settings(stage: Diffusion, checkpoint: str, seed: int) -> dict[str, str]:
    """Say how pictures are drawn, for the text chunks of their files."""
    return {
        "sampler": type(stage.sampler).__name__,
        "steps": str(stage.sampler.num_steps or stage.objective.schedule.num_steps),
        "guidance": str(getattr(stage.guidance, "scale", 1.0)),
        "seed": str(seed),
        "checkpoint": checkpoint,
        "checkpoint_sha256": ckpt.sha256(checkpoint),
        "software": f"ldm {version()}",
    }


def sample(arguments: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        arguments: The command line; None takes that of the process.
    """
    command = parser()
    options = command.parse_args(arguments)
    check_at_least("--batch-size", options.batch_size, 1)
    stage = load(options, command.instantiate(options).sampler)
    wished = wishes(options, stage.conditioner.reads)
    stage.conditioner.check(as_batch(wished))
    says, out, shown = settings(stage, options.checkpoint, options.seed), Path(options.out), []
    for i, image in enumerate(draw(stage, wished, options.seed, options.batch_size)):
        write_png(
            out / f"{i:06d}.png", image, {"prompt": str(wished[i].subject), "key": wished[i].key, **says}
        )
        shown += [image] if i < GRID_SIZE else []
    subjects = "\n".join(str(wish.subject) for wish in wished[:GRID_SIZE])
    write_png(out / "grid.png", grid(torch.stack(shown)), {"prompt": subjects, **says})
    print(f"{out}: {len(wished)} pictures, and {out / 'grid.png'}")


def _lines(path: str | None) -> list[str]:
    if path is None:
        return []
    lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    found = [line for line in lines if line]
    if not found:
        raise ValueError(f"--prompts: file '{path}' holds no caption, expected one per line")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(lambda: sample(arguments))


if __name__ == "__main__":
    sys.exit(main())

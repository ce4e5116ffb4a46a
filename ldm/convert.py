"""Bring weights here, or open them elsewhere: ``python -m ldm.convert to-diffusers --help``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from inspect import cleandoc
from typing import Literal

from jsonargparse import ArgumentParser

from ldm.cli import command_parser, run_command
from ldm.interop.compvis import ImportOptions, export_file, import_file
from ldm.interop.diffusers import export_pipeline, import_folder
from ldm.interop.open_clip import export_clip, import_clip
from ldm.interop.transformers import export_text, import_text
from ldm.io.upstream import OPTION, upstream_options

HELP = """Bring weights of other programs here, or write ours as they read them.

Each command has its own --help. Nothing is downloaded; pickles are read without running what is in them."""


def from_diffusers(folder: str, out: str, variant: str | None = None) -> None:
    """Turn a Stable Diffusion of diffusers into run folders of ours: autoencoder, text and diffusion.

    Of the folder of an AutoencoderKL alone OUT becomes the run folder. Of a pipeline
    ``python -m ldm.sample --checkpoint OUT/diffusion`` draws with it; OUT/model.yaml is what a configuration
    needs to train it further, with ``--weights OUT/diffusion``.

    Args:
        folder: Folder of the pipeline, with model_index.json; or of an autoencoder, with config.json.
        out: Folder for the run folders, or the autoencoder's run folder.
        variant: Which weights, e.g. fp16; default: those without a name, or else fp16.
    """
    print(f"wrote {import_folder(folder, out, variant)}")


def to_diffusers(run: str, out: str) -> None:
    """Write a text-to-image run as a folder that diffusers opens as a StableDiffusionPipeline.

    Args:
        run: Checkpoint or run folder of a diffusion stage.
        out: Folder to write.
    """
    print(f"wrote {export_pipeline(run, out)}")


def from_compvis(
    file: str,
    out: str,
    weights: Literal["ema", "raw"] | None = None,
    prediction: Literal["epsilon", "velocity", "sample"] | None = None,
    num_heads: int | None = None,
    image_size: int | None = None,
    scaling_factor: float | None = None,
) -> None:
    """Turn a single file of Stable Diffusion 1.x or 2.x, or of its autoencoder, into run folders of ours.

    As from-diffusers. What the file does not say is as in Stable Diffusion unless given here.

    Args:
        file: Weights with the names that CompVis gave them, .ckpt or .safetensors.
        out: Folder for the run folders.
        weights: Averaged ones, or those that were trained; default: averaged ones where there are.
        prediction: What the U-Net predicts; default: as the file
            says, else epsilon. 2.x at 768 pixels predicts velocity.
        num_heads: Heads of the U-Net at every level; default: 8 in 1.x, 64 channels each in 2.x.
        image_size: Side of the images that it was trained on; default: 512.
        scaling_factor: What multiplies the latents of the autoencoder; default: 0.18215.
    """
    options = ImportOptions(weights, prediction, num_heads, image_size, scaling_factor)
    run, notes = import_file(file, out, options)
    for note in notes:
        print(f"note: {note}")
    print(f"wrote {run}")


def to_compvis(run: str, out: str) -> None:
    """Write a text-to-image run as a single file of weights with the names that CompVis gave them.

    Args:
        run: Checkpoint or run folder of a diffusion stage.
        out: File to write, ending in .safetensors.
    """
    print(f"wrote {export_file(run, out)}")


def from_open_clip(weights: str, model: str, out: str) -> None:
    """Turn weights of open_clip, such as published ones, into a run folder of our CLIP stage.

    Later stages, metrics and ``ldm.fit --weights`` use it like a CLIP trained here.

    Args:
        weights: File of weights: .safetensors, or a pickled state dict.
        model: Name of a model that open_clip knows, e.g. ViT-B-32, or a .json file with its configuration.
        out: Run folder to write.
    """
    print(f"wrote {import_clip(weights, model, out)}")


def to_open_clip(run: str, out: str) -> None:
    """Write a CLIP stage as a folder that open_clip opens as ``local-dir:<folder>``.

    Args:
        run: Checkpoint or run folder of a CLIP stage.
        out: Folder to write.
    """
    print(f"wrote {export_clip(run, out)}")


def from_transformers(folder: str, out: str) -> None:
    """Turn a text encoder of transformers into a run folder that ``CLIPText`` conditions on.

    Args:
        folder: With config.json and weights of a CLIPTextModel, e.g. the text_encoder of Stable Diffusion.
        out: Run folder to write.
    """
    print(f"wrote {import_text(folder, out)}")


def to_transformers(run: str, out: str) -> None:
    """Write a text tower as a folder that transformers' CLIPTextModel and CLIPTokenizer open.

    Args:
        run: Checkpoint or run folder of a CLIP stage, a text tower, or a diffusion stage that has one.
        out: Folder to write.
    """
    print(f"wrote {export_text(run, out)}")


COMMANDS: tuple[Callable[..., None], ...] = (
    from_diffusers,
    to_diffusers,
    from_compvis,
    to_compvis,
    from_open_clip,
    to_open_clip,
    from_transformers,
    to_transformers,
)
"""Functions whose names, arguments and docstrings are the command line."""
EXPORTS_OF_DIFFUSION = (to_diffusers, to_compvis, to_transformers)
"""Commands with the option --upstream."""


def parser() -> ArgumentParser:
    """Describe the command line: one command per function."""
    parser = command_parser("ldm.convert", HELP)
    commands = parser.add_subcommands(dest="command", metavar="COMMAND")
    for function in COMMANDS:
        command = command_parser("", cleandoc(function.__doc__ or "").partition("\n\nArgs:")[0])
        command.add_function_arguments(function)
        if function in EXPORTS_OF_DIFFUSION:
            command.add_argument("--upstream", **OPTION)
        commands.add_subcommand(_name(function), command)
    return parser


def convert(arguments: Sequence[str] | None = None) -> None:
    """Run the command.

    Args:
        arguments: The command line; None takes that of the process.
    """
    options = parser().parse_args(arguments)
    function = {_name(each): each for each in COMMANDS}[options.command]
    given = options[options.command].as_dict()
    with upstream_options(given.pop("upstream", None)):
        function(**given)


def _name(function: Callable[..., None]) -> str:
    return function.__name__.replace("_", "-")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(lambda: convert(arguments))


if __name__ == "__main__":
    sys.exit(main())

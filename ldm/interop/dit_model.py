"""A diffusion transformer with all that it is built on, from and to run folders of ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm import class_path
from ldm.conditioners.label import ClassLabel
from ldm.conditioners.text import CLIPText
from ldm.diffusion.guidance import ClassifierFree
from ldm.diffusion.learned_variance import LearnedVariance
from ldm.diffusion.objective import Objective
from ldm.interop.model import Latents, Network, Process, autoencoder_network
from ldm.interop.runs import begin, expect, finish, prediction_class, write_autoencoder, write_text
from ldm.interop.schedules import betas, named, recognised, sampler
from ldm.io.checkpoint import Checkpoint
from ldm.io.weights import check
from ldm.latents.space import AutoencoderLatents
from ldm.nets.autoencoder import downsampling
from ldm.nets.dit import DiT
from ldm.nets.dit_blocks import DiTOptions
from ldm.stages.diffusion import Diffusion
from ldm.stages.load import load_stage
from ldm.types import DenoiserDims

SCALE = 4.0
"""Guidance scale of DiT's program for a class, and of an import."""


@dataclass(frozen=True)
class ImageTransformer:
    """A diffusion transformer's pieces, in our names.

    Args:
        dit: Arguments of ``DiT`` but its widths, options as a dict; and its weights.
        autoencoder: Of ``KLAutoencoder``.
        latents: How its latents are normalised.
        process: Schedule, prediction and sampler.
        image_size: Side of the images that it was trained on, in pixels; None if unknown.
        table: (K + 1, hidden), vectors of K classes and of none; None without classes.
        text: Of ``TextTower``; None without captions.
    """

    dit: Network
    autoencoder: Network
    latents: Latents
    process: Process
    image_size: int | None
    table: Tensor | None = None
    text: Network | None = None

    @property
    def widths(self) -> DenoiserDims:
        """Widths of the transformer."""
        output = len(self.dit.weights["proj_out.bias"]) // self.dit.arguments["patch_size"] ** 2
        return DenoiserDims(
            len(self.latents.mean),
            tokens=None if self.text is None else self.text.arguments["width"],
            vector=None if self.table is None else self.table.shape[1],
            output=output,
        )

    @property
    def grid(self) -> int | None:
        """Patches per side of the images that it was trained on; None if unknown."""
        if self.image_size is None:
            return None
        factor = downsampling(self.autoencoder.arguments["block_out_channels"])
        return int(self.image_size // (factor * self.dit.arguments["patch_size"]))

    def check(self, name: str) -> ImageTransformer:
        """Check that the weights have the names and shapes that the arguments ask for.

        Args:
            name: What messages call the transformer: its file.

        Raises:
            ValueError: If they have not.
        """
        given = dict(self.dit.arguments)
        options = DiTOptions(**given.pop("options"))
        with torch.device("meta"):
            net = DiT(self.widths, options=options, **given)
        check(self.dit.weights, {key: value.shape for key, value in net.state_dict().items()}, name)
        return self


def is_transformer(checkpoint: Checkpoint) -> bool:
    """Tell whether a checkpoint is of a diffusion stage with a ``DiT``."""
    denoiser = checkpoint.state["config"]["init_args"].get("denoiser") or {}
    return isinstance(denoiser, Mapping) and denoiser.get("class_path") == class_path(DiT)


def read_transformer(source: Checkpoint) -> ImageTransformer:
    """Read a trained diffusion stage with all that it is built on.

    Raises:
        FileNotFoundError: If a checkpoint that it is built on is not there.
        ValueError: If formats of other programs cannot express it; the message names the part.
    """
    stage = load_stage(source, Diffusion)
    latents = expect(stage.latents, AutoencoderLatents, "latents")
    dit = expect(stage.denoiser, DiT, "denoiser")
    _check_objective(stage.objective)
    weights, table, text = dit.state_dict(), None, None
    if isinstance(stage.conditioner, ClassLabel):
        weights, table = _folded(weights, stage.conditioner.embedding.weight.detach())
    else:
        tower = expect(stage.conditioner, CLIPText, "conditioner").tower
        text = Network(tower.config["init_args"], tower.state_dict())
    return ImageTransformer(
        Network(_arguments(dit), weights),
        autoencoder_network(latents.net.module, latents.net_config.get("init_args") or {}),
        Latents(latents.latent_mean.flatten(), latents.latent_std.flatten()),
        Process(
            recognised(betas(stage.objective.schedule)),
            named(prediction_class(stage.objective.prediction)),
            sampler(stage.sampler),
        ),
        stage.image_size,
        table,
        text,
    )


def check_graph(model: ImageTransformer, single: bool, as_diffusers: bool, where: str) -> None:
    """Check that a transformer has no options that a format lacks.

    Args:
        model: The transformer.
        single: Whether the format shares the modulation.
        as_diffusers: Whether it has diffusers' waves of the timestep.
        where: Name of the format.

    Raises:
        ValueError: If it has.
    """
    ours = DiTOptions(**model.dit.arguments["options"])
    wanted = DiTOptions("single" if single else "block", as_diffusers=as_diffusers).values
    modulation = ours.modulation or ("block" if model.text is None else "single")
    for name, value in {**ours.values, "modulation": modulation}.items():
        if value != wanted[name]:
            raise ValueError(
                f"model.denoiser.options.{name} is {value}, expected {wanted[name]}: {where} has no other "
                "transformer"
            )


def write_transformer(model: ImageTransformer, out: str | Path, source: Mapping[str, Any]) -> Path:
    """Write run folders autoencoder, diffusion, and with captions text, and model.yaml to train it further.

    Args:
        model: The model; its weights are widened to float32.
        out: Folder for them.
        source: Where it comes from: "program", "name" and hashes of files.

    Raises:
        ValueError: If one of the folders has a checkpoint already.
    """
    out = Path(out)
    begin(out)
    runs = [
        write_autoencoder(model.autoencoder, model.latents, out / "autoencoder", source, model.image_size)
    ]
    if model.text is not None:
        runs.append(write_text(model.text, out / "text", source))
    config, weights = stage_of(model, str(out / "autoencoder"), str(out / "text"))
    return finish(out, config, weights, runs, source, model.image_size)


def stage_of(
    model: ImageTransformer, autoencoder: str, text: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return config and weights of the stage.

    Args:
        model: The model.
        autoencoder: Run folder of its autoencoder.
        text: Of its text tower.
    """
    options = named(DiTOptions, **model.dit.arguments["options"])
    learned = model.widths.out_channels != model.widths.sample
    process = {"schedule": model.process.schedule, "prediction": model.process.prediction}
    config = named(
        Diffusion,
        latents=named(AutoencoderLatents, checkpoint=autoencoder),
        conditioner=named(CLIPText, checkpoint=text)
        if model.table is None
        else named(ClassLabel, num_classes=len(model.table) - 1, width=model.table.shape[1]),
        denoiser=named(DiT, **{**model.dit.arguments, "options": options}),
        objective=named(LearnedVariance if learned else Objective, **process),
        sampler=model.process.sampler,
        guidance=named(ClassifierFree, scale=SCALE),
    )
    weights = {f"denoiser.{name}": tensor for name, tensor in model.dit.float().weights.items()}
    if model.table is not None:
        weights["conditioner.embedding.weight"] = model.table.float()
    return config, weights


def _arguments(dit: DiT) -> dict[str, Any]:
    if dit.route_end is not None and list(dit.route_end.parameters()):
        raise ValueError(
            f"model.denoiser.routing is {type(dit.routing).__name__}, whose layers other programs' formats "
            "lack, expected Routing or none"
        )
    return {
        "patch_size": dit.patch_size,
        "hidden": dit.proj_out.in_features,
        "depth": len(dit.transformer_blocks),
        "heads": dit.heads,
        "options": dit.options.values,
        "position_grid": dit.position_grid,
    }


def _folded(weights: Mapping[str, Tensor], table: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Apply the linear layer behind the vectors of classes, if there is one, to all of them."""
    rest = {key: value for key, value in weights.items() if not key.startswith("vector_embedding.")}
    if len(rest) == len(weights):
        return rest, table
    matrix, bias = (weights[f"vector_embedding.{kind}"].double() for kind in ("weight", "bias"))
    return rest, (table.double() @ matrix.T + bias).float()


def _check_objective(objective: Objective) -> None:
    if type(objective) not in (Objective, LearnedVariance):
        raise ValueError(
            f"model.objective is {type(objective).__name__}, expected Objective or LearnedVariance: other "
            "programs' formats know no other"
        )

"""A text-to-image model as our run folders: an autoencoder, a text tower, and a diffusion stage on them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from torch import Tensor, nn

from ldm.conditioners.base import Conditioner
from ldm.conditioners.composite import Composite
from ldm.conditioners.inpainting import Inpainting
from ldm.conditioners.text import CLIPText, TowerText
from ldm.diffusion.guidance import ClassifierFree
from ldm.diffusion.prediction import Prediction
from ldm.interop.checkpoints import write_checkpoint
from ldm.interop.model import Latents, Network, Process, TextToImage, arguments, autoencoder_network
from ldm.interop.schedules import PREDICTIONS, betas, named, recognised, sampler
from ldm.io.atomic import write_text as write_text_file
from ldm.io.checkpoint import Checkpoint, find
from ldm.io.upstream import keep_upstream, run_folder
from ldm.io.weights import sha256
from ldm.latents.space import AutoencoderLatents, latent_scale
from ldm.nets.autoencoder import KLAutoencoder
from ldm.nets.unet import UNet
from ldm.stages.autoencoder import Autoencoder
from ldm.stages.diffusion import Diffusion
from ldm.stages.load import load_stage

M = TypeVar("M", bound=nn.Module)
RUNS = ("autoencoder", "text", "diffusion")
"""Run folders that an import writes."""
BEGUN = ".importing"
"""File in a folder that an import has not finished."""
HEAD = """# From {source}. To fine-tune, put this into a configuration with data and trainer of its own:
# python -m ldm.fit --config CONFIG --weights {out}/diffusion
"""


def read_run(source: str | Path | Checkpoint) -> TextToImage:
    """Read a trained diffusion stage with all that it is built on.

    Args:
        source: Checkpoint, or the path of its file or run folder.

    Raises:
        FileNotFoundError: If a checkpoint that it is built on is not there.
        ValueError: If it is no Stable Diffusion: names the part that formats of that cannot express.
    """
    stage = load_stage(source, Diffusion)
    assert stage.config is not None
    latents = expect(stage.latents, AutoencoderLatents, "latents")
    denoiser = expect(stage.denoiser, UNet, "denoiser")
    tower = _text(stage.conditioner).tower
    return TextToImage(
        Network(arguments(UNet, stage.config["init_args"]["denoiser"]["init_args"]), denoiser.state_dict()),
        autoencoder_network(latents.net.module, latents.net_config.get("init_args") or {}),
        Network(tower.config["init_args"], tower.state_dict()),
        Latents(latents.latent_mean.flatten(), latents.latent_std.flatten()),
        Process(
            recognised(betas(stage.objective.schedule)),
            named(prediction_class(stage.objective.prediction)),
            sampler(stage.sampler),
        ),
        stage.image_size,
    )


def read_autoencoder_run(checkpoint: Checkpoint) -> tuple[Network, Latents]:
    """Read a trained autoencoder and how its latents are normalised.

    Raises:
        ValueError: If the scale of the latents was not measured.
    """
    net = checkpoint.load_net(KLAutoencoder)
    given = checkpoint.net_config.get("init_args") or {}
    return autoencoder_network(net, given), Latents(*latent_scale(checkpoint))


def write_run(model: TextToImage, out: str | Path, source: Mapping[str, Any]) -> Path:
    """Write run folders autoencoder, text and diffusion, and model.yaml to configure further training.

    Args:
        model: The model; its weights are widened to float32.
        out: Folder for the three.
        source: Where it comes from: "program", "name" and hashes of files.

    Raises:
        ValueError: If one of the folders has a checkpoint already.
    """
    out = Path(out)
    begin(out)
    latents = write_autoencoder(
        model.autoencoder, model.latents, out / "autoencoder", source, model.image_size
    )
    text = write_text(model.text, out / "text", source)
    config = named(
        Diffusion,
        latents=named(AutoencoderLatents, checkpoint=str(out / "autoencoder")),
        conditioner=_conditioner(model, str(out / "text")),
        denoiser=named(UNet, **model.unet.arguments),
        objective={
            "class_path": "ldm.diffusion.Objective",
            "init_args": {"schedule": model.process.schedule, "prediction": model.process.prediction},
        },
        sampler=model.process.sampler,
        guidance=named(ClassifierFree, scale=7.5),
    )
    weights = {f"denoiser.{name}": tensor for name, tensor in model.unet.float().weights.items()}
    return finish(out, config, weights, [latents, text], source, model.image_size)


def finish(
    out: Path,
    config: dict[str, Any],
    weights: Mapping[str, Tensor],
    runs: Sequence[Path],
    source: Mapping[str, Any],
    size: int | None,
) -> Path:
    """Write the run folder of the diffusion stage and model.yaml, and end what ``begin`` began.

    Args:
        out: Folder of the runs.
        config: Of the stage.
        weights: Its state dict.
        runs: Run folders that it is built on.
        source: Where it comes from.
        size: Side of the images that it was trained on; None if unknown.
    """
    built_on = {str(run): sha256(find(run)) for run in runs}
    write_checkpoint(out / "diffusion", "diffusion", config, weights, source, size, built_on)
    keep_upstream(out / "diffusion", built_on)
    yaml_text = yaml.safe_dump({"model": config}, sort_keys=False, default_flow_style=None, width=110)
    write_text_file(out / "model.yaml", HEAD.format(source=source.get("name"), out=out) + yaml_text)
    (out / BEGUN).unlink()
    return out / "diffusion"


def begin(out: Path) -> None:
    """Mark a folder as being written; what an import that was killed left there is deleted.

    Raises:
        ValueError: If it has runs.
    """
    if (out / BEGUN).exists():
        for name in RUNS:
            shutil.rmtree(out / name, ignore_errors=True)
    for name in RUNS:
        if (found := out / name / "checkpoints" / "last.ckpt").exists():
            raise ValueError(f"--out: '{found}' is there already, expected a folder without runs")
    write_text_file(out / BEGUN, "An import is being written here; the same command repeats it.\n")


def write_autoencoder(
    network: Network, latents: Latents, out: str | Path, source: Mapping[str, Any], size: int | None = None
) -> Path:
    """Write the run folder of an autoencoder stage; its weights are widened to float32.

    Args:
        network: Of ``KLAutoencoder``.
        latents: How its latents are normalised.
        out: Run folder.
        source: Where it comes from: "program", "name" and hashes of files.
        size: Side of the images that it was trained on; None if unknown, which takes any.

    Raises:
        ValueError: If ``out`` has a checkpoint.
    """
    config = named(Autoencoder, net=named(KLAutoencoder, **network.arguments))
    weights = {f"net.{name}": tensor for name, tensor in network.float().weights.items()}
    weights |= {"latent_mean": latents.mean, "latent_std": latents.std}
    return run_folder(write_checkpoint(out, "autoencoder", config, weights, source, size))


def write_text(network: Network, out: Path, source: Mapping[str, Any]) -> Path:
    """Write the run folder of a text tower; its weights are widened to float32."""
    config = {"class_path": "ldm.nets.TextTower", "init_args": network.arguments}
    return run_folder(write_checkpoint(out, "text_tower", config, network.float().weights, source))


def _conditioner(model: TextToImage, text: str) -> dict[str, Any]:
    captions = named(CLIPText, checkpoint=text)
    if not model.inpaints:
        return captions
    return named(Composite, conditioners=[captions, named(Inpainting)])


def _text(conditioner: Conditioner) -> TowerText:
    """Find the captions' conditioner where it is the only one, or is combined with a mask."""
    conditioners = conditioner.members if type(conditioner) is Composite else [conditioner]
    kinds = [type(member) for member in conditioners]
    projected = isinstance(conditioner, Composite) and bool(list(conditioner.projections.parameters()))
    if not issubclass(kinds[0], TowerText) or kinds[1:] not in ([], [Inpainting]) or projected:
        found = " and ".join(kind.__name__ for kind in kinds)
        found += " with projected tokens" if projected else ""
        raise ValueError(
            f"model.conditioner is {found}, expected CLIPText, or CLIPText and Inpainting: Stable "
            "Diffusion's formats know no other conditions"
        )
    assert isinstance(conditioners[0], TowerText)
    return conditioners[0]


def prediction_class(found: Prediction) -> type[Prediction]:
    """Return the class of a prediction, one that formats of Stable Diffusion know.

    Raises:
        ValueError: If it is another.
    """
    if type(found) not in PREDICTIONS.values():
        expected = " or ".join(kind.__name__ for kind in PREDICTIONS.values())
        raise ValueError(
            f"model.objective.prediction is {type(found).__name__}, expected {expected}: Stable Diffusion's "
            "formats know no other"
        )
    return type(found)


def expect(found: nn.Module, kind: type[M], key: str) -> M:
    """Check the class of a part of a stage.

    Args:
        found: The part.
        kind: Its class.
        key: Of the configuration.

    Raises:
        ValueError: If it is of another.
    """
    if type(found) is not kind:
        raise ValueError(
            f"model.{key} is {type(found).__name__}, expected {kind.__name__}: Stable Diffusion's formats "
            "know no other"
        )
    return found

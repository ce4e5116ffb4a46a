"""Stable Diffusion as a folder of diffusers: model_index.json, and one folder for each network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ldm.interop import dit_folders, tokenizer
from ldm.interop.checkpoints import open_exported
from ldm.interop.diffusers_configs import (
    check_unshifted,
    unet_arguments,
    unet_config,
    vae_config,
)
from ldm.interop.diffusers_vae import WEIGHTS, read_vae, write_vae
from ldm.interop.dit_folders import export_transformer, import_transformer, write_text_folders
from ldm.interop.dit_model import is_transformer
from ldm.interop.files import new_folder, record
from ldm.interop.folders import ModelFolder, read_model_folder
from ldm.interop.latents import stripped
from ldm.interop.model import Network, TextToImage
from ldm.interop.runs import read_autoencoder_run, read_run, write_autoencoder, write_run
from ldm.interop.schedules import check_process, process, scheduler_config
from ldm.interop.transformers import STEMS, empty_tower, tower_weights
from ldm.io.checkpoint import Checkpoint
from ldm.io.json_file import read_json, write_json
from ldm.io.weights import sha256, write_weights
from ldm.nets.autoencoder import KLAutoencoder, downsampling

PIPELINES = {False: "StableDiffusionPipeline", True: "StableDiffusionInpaintPipeline"}
"""Pipeline of a model, by whether it inpaints."""
RECORD = "ldm.json"
"""File that names the source of an export of ours."""


def import_folder(folder: str | Path, out: str | Path, variant: str | None = None) -> Path:
    """Turn a Stable Diffusion or DiT of diffusers into run folders of ours: autoencoder, text, diffusion.

    ``python -m ldm.sample --checkpoint OUT/diffusion`` draws with it; OUT/model.yaml is what a configuration
    needs to train it further, with ``--weights OUT/diffusion``. Of an AutoencoderKL alone, which every later
    stage can use, OUT itself becomes the run folder.

    Args:
        folder: Folder of the pipeline, with model_index.json; or of an autoencoder, with config.json.
        out: Folder for the run folders, or the autoencoder's run folder.
        variant: Which weights, e.g. fp16; default: those without a name, or else fp16.

    Returns:
        The run folder of the diffusion stage, or the autoencoder's.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If it is another kind of pipeline, or a part cannot be expressed here.
    """
    folder = Path(folder)
    if not folder.is_dir():
        hint = "; from-compvis reads single files" if folder.is_file() else ""
        raise FileNotFoundError(f"'{folder}' is no folder, expected a pipeline of diffusers{hint}")
    source: dict[str, Any] = {"program": "diffusers", "name": folder.resolve().name}
    if not (index := folder / "model_index.json").is_file():
        if not (folder / "config.json").is_file():
            raise FileNotFoundError(f"'{index}' does not exist, nor a config.json of an AutoencoderKL")
        return _import_autoencoder(read_model_folder(folder, (WEIGHTS,), variant), out, source)
    kind = read_json(index).get("_class_name")
    if kind in dit_folders.PIPELINES:
        return import_transformer(folder, out, variant, source)
    if kind not in PIPELINES.values():
        expected = " or ".join([*PIPELINES.values(), *dit_folders.PIPELINES])
        hint = f"; its autoencoder alone is in {folder / 'vae'}" if (folder / "vae").is_dir() else ""
        raise ValueError(f"{index}: _class_name is {kind}, expected {expected}{hint}")
    folders = {
        "unet": read_model_folder(folder / "unet", (WEIGHTS,), variant),
        "vae": read_model_folder(folder / "vae", (WEIGHTS,), variant),
        "text_encoder": read_model_folder(folder / "text_encoder", STEMS, variant),
    }
    check_unshifted(folders["vae"].config, folders["vae"].config_name)
    files = {f"{name}/{file.name}": file for name, found in folders.items() for file in found.files}
    source["sha256"] = {name: sha256(file) for name, file in files.items()}
    return write_run(_model(folder, folders), out, source)


def export_pipeline(run: str | Path, out: str | Path) -> Path:
    """Write a run as a folder that diffusers opens, with a U-Net as a StableDiffusionPipeline.

    A DiT of class labels opens as a DiTPipeline, one of captions as a PixArtAlphaPipeline. An autoencoder
    alone becomes an AutoencoderKL, with the statistics of its latents in the config.json.

    Args:
        run: Checkpoint or run folder of a diffusion stage, or of an autoencoder.
        out: Folder to write.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        ValueError: If the run has parts that Stable Diffusion has not, or ``out`` has files.
    """
    with new_folder(out) as folder:
        checkpoint = open_exported(run)
        produced_by = record(checkpoint)
        metadata = {"software": produced_by["software"], "source_sha256": produced_by["sha256"]}
        write_json(folder / RECORD, produced_by)
        if checkpoint.stage == "autoencoder":
            _write_alone(checkpoint, folder, metadata)
            return Path(out)
        if is_transformer(checkpoint):
            export_transformer(checkpoint, folder, metadata)
            return Path(out)
        model = read_run(checkpoint)
        _write_unet(model, folder / "unet", metadata)
        write_vae(model.autoencoder, model.latents, model.image_size, folder / "vae", metadata)
        write_text_folders(model.text, folder)
        write_json(folder / "scheduler" / "scheduler_config.json", scheduler_config(model.process))
        write_json(folder / "model_index.json", _index(model.inpaints))
    return Path(out)


def _import_autoencoder(vae: ModelFolder, out: str | Path, source: dict[str, Any]) -> Path:
    network, latents = read_vae(vae)
    network.check(KLAutoencoder, vae.name)
    hashes = {file.name: sha256(file) for file in vae.files}
    ours = read_json(vae.folder / RECORD) if (vae.folder / RECORD).is_file() else {}
    return write_autoencoder(network, latents, out, {**source, "sha256": hashes}, ours.get("image_size"))


def _model(folder: Path, folders: dict[str, ModelFolder]) -> TextToImage:
    unet, vae, text = (folders[name] for name in ("unet", "vae", "text_encoder"))
    autoencoder, latents = read_vae(vae)
    tower = empty_tower(text.config, tokenizer.pad_id(folder / "tokenizer"), text.config_name)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    size = unet.config.get("sample_size")
    factor = downsampling(autoencoder.arguments["block_out_channels"])
    model = TextToImage(
        Network(unet_arguments(unet.config, unet.config_name), unet.weights).float(),
        autoencoder,
        Network(tower.config["init_args"], tower_weights(text.weights)),
        latents,
        check_process(process(read_json(scheduler), str(scheduler)), str(scheduler)),
        size * factor if isinstance(size, int) else None,
    )
    return model.check(
        dict(zip(("unet", "autoencoder", "text"), (unet.name, vae.name, text.name), strict=True))
    )


def _write_unet(model: TextToImage, folder: Path, metadata: dict[str, str]) -> None:
    widths = model.widths
    config = unet_config(
        model.unet.arguments, widths.sample, widths.sample + widths.spatial, model.text.arguments["width"]
    )
    if model.image_size is not None:
        config["sample_size"] = model.image_size // downsampling(
            model.autoencoder.arguments["block_out_channels"]
        )
    write_json(folder / "config.json", config)
    write_weights(folder / f"{WEIGHTS}.safetensors", model.unet.weights, metadata)


def _write_alone(checkpoint: Checkpoint, folder: Path, metadata: dict[str, str]) -> None:
    """Write an AutoencoderKL; convolutions around the latent that do nothing are left out."""
    network, latents = read_autoencoder_run(checkpoint)
    weights = stripped(network.weights)
    config = vae_config(network.arguments, latents, has_quant_conv=len(weights) == len(network.weights))
    if (size := checkpoint.state.get("image_size")) is not None:
        config["sample_size"] = size
    write_json(folder / "config.json", config)
    write_weights(folder / f"{WEIGHTS}.safetensors", weights, metadata)


def _index(inpaints: bool) -> dict[str, Any]:
    return {
        "_class_name": PIPELINES[inpaints],
        "_diffusers_version": "0.35.0",  # of the format: what their loader asks for
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
    }

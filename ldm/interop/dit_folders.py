"""Diffusion transformers as folders of diffusers: ``DiTPipeline``, for captions ``PixArtAlphaPipeline``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.interop import tokenizer
from ldm.interop.diffusers_configs import check_unshifted, checked
from ldm.interop.diffusers_vae import WEIGHTS, read_vae, write_vae
from ldm.interop.dit_keys import from_diffusers, from_pixart, num_blocks, to_diffusers, to_pixart
from ldm.interop.dit_model import ImageTransformer, check_graph, read_transformer, write_transformer
from ldm.interop.folders import ModelFolder, read_model_folder
from ldm.interop.model import Network
from ldm.interop.schedules import check_process, process, scheduler_config
from ldm.interop.transformers import STEMS, empty_tower, tower_weights, write_text_encoder
from ldm.io.checkpoint import Checkpoint
from ldm.io.json_file import read_json, write_json
from ldm.io.weights import sha256, write_weights
from ldm.nets.autoencoder import downsampling
from ldm.nets.text import TextTower

PIPELINES = {"DiTPipeline": "DiTTransformer2DModel", "PixArtAlphaPipeline": "PixArtTransformer2DModel"}
"""Class of the transformer of each pipeline."""
NULL_CLASS = 1000
"""Class that ``DiTPipeline`` takes for none."""
FIXED: dict[str, Any] = {
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "norm_elementwise_affine": False,
}
"""Settings that our transformer has at one value; also their defaults."""
FREE: dict[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": None,
    "num_layers": 28,
    "dropout": 0.0,
    "norm_num_groups": 32,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
    "upcast_attention": False,
}
"""Settings that may have any value, with diffusers' defaults."""
DIT_FIXED = {**FIXED, "norm_type": "ada_norm_zero", "norm_eps": 1e-5}
PIXART_FIXED = {**FIXED, "norm_type": "ada_norm_single", "norm_eps": 1e-6, "attention_type": "default"}
PIXART_FREE = {
    **FREE,
    "out_channels": 8,
    "sample_size": 128,
    "cross_attention_dim": 1152,
    "caption_channels": None,
    "interpolation_scale": None,
    "use_additional_conditions": None,
}


def import_transformer(folder: Path, out: str | Path, variant: str | None, source: dict[str, Any]) -> Path:
    """Turn a pipeline of a transformer into run folders of ours; see ``diffusers.import_folder``."""
    kind = read_json(folder / "model_index.json")["_class_name"]
    names: dict[str, tuple[str, ...]] = {"transformer": (WEIGHTS,), "vae": (WEIGHTS,)}
    if kind == "PixArtAlphaPipeline":
        _check_text(folder)
        names["text_encoder"] = STEMS
    folders = {name: read_model_folder(folder / name, stems, variant) for name, stems in names.items()}
    check_unshifted(folders["vae"].config, folders["vae"].config_name)
    files = {f"{name}/{file.name}": file for name, found in folders.items() for file in found.files}
    source["sha256"] = {name: sha256(file) for name, file in files.items()}
    return write_transformer(_model(folder, kind, folders), out, source)


def export_transformer(checkpoint: Checkpoint, folder: Path, metadata: dict[str, str]) -> None:
    """Write a run as a folder that diffusers opens; see ``diffusers.export_pipeline``.

    Raises:
        ValueError: If diffusers has no such transformer.
    """
    model = read_transformer(checkpoint)
    kind = "DiTPipeline" if model.text is None else "PixArtAlphaPipeline"
    single = model.text is not None
    check_graph(model, single, as_diffusers=not single, where=f"diffusers' {PIPELINES[kind]}")
    weights = to_pixart(model.dit.weights) if model.table is None else _dit_weights(model)
    write_json(folder / "transformer" / "config.json", _config(model, PIPELINES[kind]))
    write_weights(folder / "transformer" / f"{WEIGHTS}.safetensors", weights, metadata)
    write_vae(model.autoencoder, model.latents, model.image_size, folder / "vae", metadata)
    write_json(folder / "scheduler" / "scheduler_config.json", scheduler_config(model.process))
    if model.text is not None:
        write_text_folders(model.text, folder)
    write_json(folder / "model_index.json", _index(kind))


def write_text_folders(text: Network, out: Path) -> None:
    """Write text encoder and tokenizer of a pipeline."""
    tower = TextTower(**text.arguments)
    tower.load_state_dict(text.weights)
    write_text_encoder(tower, out / "text_encoder")
    tokenizer.write_tokenizer(out / "tokenizer", tower.context_length, tower.pad_id)


def _check_text(folder: Path) -> None:
    _, kind = read_json(folder / "model_index.json").get("text_encoder", [None, None])
    if kind != "CLIPTextModel":
        raise ValueError(
            f"{folder / 'model_index.json'}: text_encoder is {kind}, expected CLIPTextModel: ours is a CLIP's"
        )


def _model(folder: Path, kind: str, folders: dict[str, ModelFolder]) -> ImageTransformer:
    found, (autoencoder, latents) = folders["transformer"], read_vae(folders["vae"])
    scheduler, text, table = folder / "scheduler" / "scheduler_config.json", None, None
    if kind == "DiTPipeline":
        config = checked(found.config, PIPELINES[kind], FREE, DIT_FIXED, found.config_name)
        weights, table = from_diffusers(found.weights, found.name)
        table, options, scale = _known_classes(table), {"as_diffusers": True}, 1
    else:
        config = checked(found.config, PIPELINES[kind], PIXART_FREE, PIXART_FIXED, found.config_name)
        weights, options = from_pixart(found.weights, found.name), {}
        tower_config = folders["text_encoder"]
        pad = tokenizer.pad_id(folder / "tokenizer")
        tower = empty_tower(tower_config.config, pad, tower_config.config_name)
        text = Network(tower.config["init_args"], tower_weights(tower_config.weights))
        scale = config["interpolation_scale"] or max(config["sample_size"] // 64, 1)
    arguments = {
        "patch_size": config["patch_size"],
        "hidden": config["num_attention_heads"] * config["attention_head_dim"],
        "depth": num_blocks(found.weights, "transformer_blocks."),
        "heads": config["num_attention_heads"],
        "options": options,
        "position_grid": config["sample_size"] // config["patch_size"] / scale,
    }
    size = config["sample_size"] * downsampling(autoencoder.arguments["block_out_channels"])
    made_of = check_process(process(read_json(scheduler), str(scheduler)), str(scheduler))
    network = Network(arguments, weights).float()
    return ImageTransformer(network, autoencoder, latents, made_of, size, table, text).check(found.name)


def _known_classes(table: Tensor) -> Tensor:
    """Undo ``_all_classes``."""
    while len(table) > 2 and torch.equal(table[-1], table[-2]):
        table = table[:-1]
    return table


def _all_classes(table: Tensor) -> Tensor:
    """Repeat the null class, the last one, up to the number that the pipeline knows it by."""
    if len(table) > NULL_CLASS + 1:
        raise ValueError(
            f"model.conditioner.num_classes is {len(table) - 1}, expected at most {NULL_CLASS}: DiTPipeline "
            "takes the class after those for none"
        )
    return torch.cat([table, table[-1:].expand(NULL_CLASS + 1 - len(table), -1)])


def _dit_weights(model: ImageTransformer) -> dict[str, Tensor]:
    assert model.table is not None
    return to_diffusers(model.dit.weights, _all_classes(model.table))


def _config(model: ImageTransformer, kind: str) -> dict[str, Any]:
    given, widths = model.dit.arguments, model.widths
    grid, positions = model.grid, given["position_grid"]
    if grid is None:
        raise ValueError("the size of the images is unknown, which diffusers needs: train the model first")
    config = {
        "_class_name": kind,
        **(DIT_FIXED if model.text is None else PIXART_FIXED),
        "num_attention_heads": given["heads"],
        "attention_head_dim": given["hidden"] // given["heads"],
        "in_channels": widths.sample,
        "out_channels": widths.out_channels,
        "num_layers": given["depth"],
        "sample_size": grid * given["patch_size"],
        "patch_size": given["patch_size"],
        "num_embeds_ada_norm": NULL_CLASS,
    }
    scale = 1 if positions is None else grid / positions
    if model.text is not None:
        return {
            **config,
            "cross_attention_dim": given["hidden"],
            "caption_channels": widths.tokens,
            "interpolation_scale": scale,
            "use_additional_conditions": False,
        }
    if scale != 1:
        raise ValueError(
            f"model.denoiser.position_grid is {positions}, expected {grid}, the patches of a side: "
            f"diffusers' {kind} interpolates to no other"
        )
    return config


def _index(kind: str) -> dict[str, Any]:
    text = {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    return {
        "_class_name": kind,
        "_diffusers_version": "0.35.0",  # of the format: what their loader asks for
        "transformer": ["diffusers", PIPELINES[kind]],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        **(text if kind == "PixArtAlphaPipeline" else {}),
    }

"""Text towers as folders that transformers' ``CLIPTextModel`` and ``CLIPTokenizer`` read and write."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.conditioners.text import TowerText, load_tower
from ldm.interop import tokenizer
from ldm.interop.checkpoints import write_checkpoint
from ldm.interop.files import new_folder, record
from ldm.interop.folders import read_model_folder
from ldm.io.checkpoint import Checkpoint
from ldm.io.json_file import write_json
from ldm.io.weights import check, sha256, write_weights
from ldm.nets.text import VOCAB_SIZE, TextTower
from ldm.stages.diffusion import Diffusion
from ldm.stages.load import load_stage

PREFIX = "text_model."
"""Begins the names of all parameters up to transformers 4; version 5 reads them with it and without."""
REST = (
    "vision_model.",
    "visual_projection.",
    "text_projection.",
    "logit_scale",
    "embeddings.position_ids",
)
"""Beginnings of names outside of the tower: the rest of a CLIP, and a table of positions."""
STEMS = ("model", "pytorch_model")
"""Prefixes of files of weights."""
QUICK_GELU = {"gelu": False, "quick_gelu": True}
"""Value of ``quick_gelu`` for each ``hidden_act``."""
DEFAULTS: dict[str, Any] = {
    "model_type": "clip_text_model",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
"""Defaults of transformers for a config.json: the tower of OpenAI's ViT-B/32."""


def text_config(tower: TextTower) -> dict[str, Any]:
    """Describe a tower as the config.json of a ``CLIPTextModel``."""
    ids = tokenizer.vocabulary()
    return DEFAULTS | {
        "architectures": ["CLIPTextModel"],
        "hidden_size": tower.width,
        "intermediate_size": round(tower.width * tower.mlp_ratio),
        "projection_dim": tower.width,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
        "max_position_embeddings": tower.context_length,
        "hidden_act": "quick_gelu" if tower.quick_gelu else "gelu",
        "bos_token_id": ids[tokenizer.BEGIN],
        "eos_token_id": ids[tokenizer.END],
        "pad_token_id": tower.pad_id,
        "torch_dtype": "float32",
    }


def empty_tower(config: Mapping[str, Any], pad_id: int, name: str) -> TextTower:
    """Build the tower that a config.json describes, on the meta device: shapes and no weights.

    Args:
        config: Of a ``CLIPTextModel``, or of a ``CLIPModel``, which has one inside.
        pad_id: Token that fills up short captions.
        name: The file, for messages.

    Raises:
        ValueError: If it describes another kind of tower; the message names the key.
    """
    config = DEFAULTS | dict(config.get("text_config") or config)
    expected = {key: [DEFAULTS[key]] for key in ("model_type", "vocab_size", "layer_norm_eps")}
    expected["hidden_act"] = list(QUICK_GELU)
    for key, allowed in expected.items():
        if (found := config[key]) not in allowed:
            raise ValueError(f"{name}: {key} is {found}, expected {' or '.join(map(str, allowed))}")
    with torch.device("meta"):
        return TextTower(
            width=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            context_length=config["max_position_embeddings"],
            mlp_ratio=config["intermediate_size"] / config["hidden_size"],
            quick_gelu=QUICK_GELU[config["hidden_act"]],
            pad_id=pad_id,
        )


def tower_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Pick a tower's parameters, in float32, out of a ``CLIPTextModel``'s or a ``CLIPModel``'s."""
    named = {name.removeprefix(PREFIX): value for name, value in weights.items()}
    return {name: value.float() for name, value in named.items() if not name.startswith(REST)}


def import_text(folder: str | Path, out: str | Path) -> Path:
    """Turn a text encoder of transformers into a run folder that ``CLIPText`` conditions on.

    The padding token is that of the folder's tokenizer, or of the tokenizer next to it, as in folders of
    Stable Diffusion; without either it is the end mark, transformers' default.

    Args:
        folder: With config.json and weights of a CLIPTextModel or a CLIPModel, e.g. the text_encoder of
            Stable Diffusion.
        out: Run folder to write.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the folder holds another kind of model, or ``out`` has a checkpoint already.
    """
    folder = Path(folder)
    padding = tokenizer.pad_id(folder, folder.resolve().parent / "tokenizer")
    found = read_model_folder(folder, STEMS, None)
    tower, weights = empty_tower(found.config, padding, found.config_name), tower_weights(found.weights)
    check(weights, {name: value.shape for name, value in tower.state_dict().items()}, found.name)
    hashes = {file.name: sha256(file) for file in found.files}
    source = {"program": "transformers", "name": folder.resolve().name, "sha256": hashes}
    return write_checkpoint(out, "text_tower", tower.config, weights, source)


def export_text(run: str | Path, out: str | Path) -> Path:
    """Write a text tower as a folder that transformers' CLIPTextModel and CLIPTokenizer open.

    ldm.json records the origin of the weights.

    Args:
        run: Checkpoint or run folder of a CLIP stage, a text tower, or a diffusion stage that has one.
        out: Folder to write.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        ValueError: If it has no text tower, or ``out`` has files.
    """
    with new_folder(out) as folder:
        checkpoint = Checkpoint.open(run)
        is_diffusion = checkpoint.stage == Diffusion.name
        tower = _tower_of_diffusion(checkpoint) if is_diffusion else load_tower(checkpoint)
        write_text_encoder(tower, folder)
        tokenizer.write_tokenizer(folder, tower.context_length, tower.pad_id)
        write_json(folder / "ldm.json", record(checkpoint))
    return Path(out)


def write_text_encoder(tower: TextTower, folder: str | Path) -> None:
    """Write config.json and model.safetensors of a tower."""
    weights = {f"{PREFIX}{name}": value for name, value in tower.state_dict().items()}
    write_json(Path(folder) / "config.json", text_config(tower))
    write_weights(Path(folder) / f"{STEMS[0]}.safetensors", weights, {})


def _tower_of_diffusion(checkpoint: Checkpoint) -> TextTower:
    conditioner = load_stage(checkpoint, Diffusion).conditioner
    towers = [module.tower for module in conditioner.modules() if isinstance(module, TowerText)]
    if len(towers) != 1:
        found = type(conditioner).__name__
        raise ValueError(
            f"checkpoint '{checkpoint.file}': conditioner is a {found}, expected one CLIPText in it"
        )
    return towers[0]

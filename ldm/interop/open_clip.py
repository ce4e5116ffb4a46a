"""Import and export of CLIP models of open_clip."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.interop.checkpoints import write_checkpoint
from ldm.interop.files import new_folder, record
from ldm.io.checkpoint import Checkpoint, instantiate
from ldm.io.json_file import read_json, write_json
from ldm.io.weights import bare, check, read_weights, sha256, write_weights
from ldm.nets.clip import NUMBERS, CLIPModel
from ldm.nets.text import VOCAB_SIZE

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
"""Files of a folder that open_clip opens as ``local-dir:<folder>``."""
ARGUMENTS = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_bias")
"""Keys of open_clip's configuration of a plain CLIP."""
APART, TEXT = "custom_text", "text."
"""Key of models whose text tower is a module of its own, and how the names of its weights then begin."""
FOREIGN = ("hf_model_name", "hf_tokenizer_name", "tokenizer_kwargs", "tokenizer_mode")
"""Keys of ``text_cfg`` that ask for another text tower, or for other tokens."""
NO_WEIGHTS = {"input_resolution", "context_length", "vocab_size"}
"""Numbers that OpenAI's state dicts hold between the weights."""


def import_clip(weights: str | Path, model: str | Path, out: str | Path) -> Path:
    """Turn weights of open_clip, such as published ones, into a run folder of our CLIP stage.

    Later stages, metrics and ``ldm.fit --weights`` use it like a CLIP trained here.

    Args:
        weights: File of weights: .safetensors, or a pickled state dict, such as open_clip's training writes.
        model: Name of a model that open_clip knows, e.g. ViT-B-32, or a .json file with its configuration,
            such as open_clip_config.json.
        out: Run folder to write.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the model is no plain CLIP with CLIP's own tokens, the weights are of another model, or
            ``out`` has a checkpoint already.
    """
    net = {"class_path": "ldm.nets.CLIPModel", "init_args": clip_arguments(model)}
    with torch.device("meta"):
        empty, _ = instantiate(net, CLIPModel)
    shapes = {name: value.shape for name, value in empty.state_dict().items()}
    found = {f"model.{name}": value for name, value in _state_dict(Path(weights)).items()}
    numbers = {f"model.{name}" for name in NUMBERS} & found.keys()
    found |= {name: found[name].reshape(1) for name in numbers}
    check(found, shapes, str(weights))
    config = {"class_path": "ldm.stages.CLIP", "init_args": {"net": net}}
    source = {"program": "open_clip", "file": Path(weights).name, "sha256": sha256(weights)}
    named = {f"net.{name}": value for name, value in found.items()}
    return write_checkpoint(out, "clip", config, named, source, empty.image_size)


def clip_arguments(model: str | Path) -> dict[str, Any]:
    """Read the arguments of a ``CLIPModel`` from a configuration of open_clip.

    Images are normalised by its ``preprocess_cfg``. Models that open_clip knows by name have none: they use
    the statistics of OpenAI and LAION.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If there is no such model, or it is no plain CLIP; the message names the key.
    """
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD  # here: two seconds of --help

    config, preprocess = _read_config(model)
    text = {f"text_cfg.{key}": config["text_cfg"].get(key) for key in FOREIGN}
    unknown = {key: value for key, value in config.items() if key not in (*ARGUMENTS, APART)}
    for key, value in (text | unknown).items():
        if value:
            raise ValueError(f"{model}: {key} is {value}, expected a CLIP of open_clip's own, without it")
    if (size := config["text_cfg"].get("vocab_size", VOCAB_SIZE)) != VOCAB_SIZE:
        raise ValueError(f"{model}: text_cfg.vocab_size is {size}, expected {VOCAB_SIZE}, CLIP's byte pairs")
    bias = config.get("init_logit_bias")
    return {
        "embed_dim": config["embed_dim"],
        "vision_cfg": {k: v for k, v in config["vision_cfg"].items() if k != "timm_model_pretrained"},
        "text_cfg": dict(config["text_cfg"]),
        "quick_gelu": bool(config.get("quick_gelu", False)),
        "image_mean": list(preprocess.get("mean", OPENAI_DATASET_MEAN)),
        "image_std": list(preprocess.get("std", OPENAI_DATASET_STD)),
    } | ({} if bias is None else {"init_logit_bias": bias})


def export_clip(run: str | Path, out: str | Path) -> Path:
    """Write a CLIP stage as a folder that open_clip opens as ``local-dir:<folder>``, with its statistics.

    ldm.json records the origin of the weights.

    Args:
        run: Checkpoint or run folder of a CLIP stage.
        out: Folder to write.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        ValueError: If it is of another stage, or ``out`` has files.
    """
    with new_folder(out) as folder:
        checkpoint = Checkpoint.open(run, "clip")
        net, arguments = checkpoint.load_net(CLIPModel), checkpoint.net_config["init_args"]
        preprocess = {"mean": list(net.image_mean), "std": list(net.image_std), "interpolation": "bicubic"}
        model = {key: arguments[key] for key in ARGUMENTS if arguments.get(key) is not None}
        write_json(folder / CONFIG, {"model_cfg": model, "preprocess_cfg": preprocess})
        weights = net.model.state_dict()
        numbers = {name: weights[name].reshape(()) for name in NUMBERS if name in weights}
        write_weights(folder / WEIGHTS, weights | numbers, {})
        write_json(folder / "ldm.json", record(checkpoint))
    return Path(out)


def _read_config(model: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return ``model_cfg`` and ``preprocess_cfg`` of a file, or those of a name."""
    if str(model).endswith(".json"):
        found = read_json(model)
        config, preprocess = found.get("model_cfg", found), found.get("preprocess_cfg", {})
    else:
        import open_clip

        config, preprocess = open_clip.get_model_config(_known(str(model))), {}
    if missing := [key for key in ARGUMENTS[:3] if key not in config]:
        raise ValueError(f"{model}: has no {' and no '.join(missing)}, expected open_clip's configuration")
    return config, preprocess


def _known(name: str) -> str:
    """Check a name against open_clip's list: it would look for others on the network."""
    import open_clip

    cleaned, names = name.replace("/", "-"), open_clip.list_models()
    if cleaned not in names:
        near = difflib.get_close_matches(cleaned, names) or names[:3]
        raise ValueError(
            f"--model: got '{name}', expected a model that open_clip knows, such as {', '.join(near)}, or a "
            ".json file with its configuration"
        )
    return cleaned


def _state_dict(path: Path) -> Mapping[str, Tensor]:
    """Read a model's state dict, without what parallel or compiled training puts before the names."""
    named = {name.removeprefix(TEXT): value for name, value in bare(read_weights(path)).items()}
    return {
        name: value.float() if value.is_floating_point() else value
        for name, value in named.items()
        if name not in NO_WEIGHTS
    }

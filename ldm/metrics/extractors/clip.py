"""Networks of the project and of open_clip as extractors."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.io.json_file import read_json
from ldm.io.weights import bare, check, read_weights, sha256, tensors_sha256
from ldm.metrics.features import Extractor
from ldm.metrics.metric import Metadata
from ldm.types import Batch


@runtime_checkable
class Features(Protocol):
    """Describes an image by a vector."""

    def image_features(self, image: Tensor) -> Tensor:
        """Map images (B, 3, H, W) in [-1, 1] to features (B, F)."""
        ...


@runtime_checkable
class ImageText(Protocol):
    """Maps images and captions into one space, where matching ones are close."""

    def image_features(self, image: Tensor) -> Tensor:
        """Map images (B, 3, H, W) in [-1, 1] to vectors (B, E) that point like ``encode_image``'s."""
        ...

    def encode_text(self, text: list[str]) -> Tensor:
        """Map B captions to unit vectors (B, E)."""
        ...


class CLIPExtractor(Extractor):
    """A CLIP: the project's own, or any other with an image tower and a text tower.

    Args:
        clip: Image and text tower.
        name: Short name; values are called ``<measure>/<name>``.
    """

    def __init__(self, clip: ImageText, name: str = "clip") -> None:
        super().__init__(name, ("features", "embedding", "text", "agreement", "caption"))
        self.clip, self.image_channels = clip, getattr(clip, "image_channels", 3)
        self.context_length = getattr(clip, "context_length", None)

    def forward(self, images: Tensor, batch: Batch, views: Collection[str]) -> dict[str, Tensor]:
        """Embed images, and captions if requested.

        Raises:
            ValueError: If captions are requested and the samples have none.
        """
        features = self.clip.image_features(images)
        found = {"features": features, "embedding": F.normalize(features, dim=1)}
        if {"text", "agreement", "caption"} & set(views):
            if "text" not in batch:
                raise ValueError(
                    f"{self.name}: the samples have {sorted(batch)}, expected 'text' (captions in the shards)"
                )
            text = self.clip.encode_text(batch["text"]).to(features)
            cosine = (found["embedding"].double() * text.double()).sum(1, keepdim=True)
            found |= {"text": text, "agreement": cosine.clamp_min(0.0), "caption": _numbers(batch["text"])}
        return found

    def metadata(self) -> Metadata:
        """Name the class and hash the weights."""
        return network_metadata(self.clip)


class Embedding(Extractor):
    """Any network that describes an image by a vector: of RGB, unless it says ``image_channels``.

    Args:
        network: The network.
        name: Short name; values are called ``<measure>/<name>``.
    """

    def __init__(self, network: Features, name: str) -> None:
        super().__init__(name, ("features",))
        self.network, self.image_channels = network, getattr(network, "image_channels", 3)

    def forward(self, images: Tensor, batch: Batch, views: Collection[str]) -> dict[str, Tensor]:
        """Describe images."""
        return {"features": self.network.image_features(images)}

    def metadata(self) -> Metadata:
        """Name the class and hash the weights."""
        return network_metadata(self.network)


class OpenCLIP(nn.Module):
    """A model of open_clip, from a local file of its weights, with the preprocessing that belongs to it.

    One whose text tower or tokens are another program's (SigLIP, RoBERTa ...) needs them as local folders, by
    ``hf_tokenizer_name`` and ``hf_model_name`` in its open_clip_config.json: nothing is downloaded.

    Args:
        model: One of ``open_clip.list_models()``, e.g. ViT-L-14-336, or a folder with open_clip_config.json.
        weights: File of weights, .pt or .safetensors.
        quick_gelu: Use the sigmoid approximation of GELU, as OpenAI's weights need.
    """

    def __init__(self, model: str, weights: str, quick_gelu: bool = False) -> None:
        import open_clip  # here, as in ldm.nets.clip: a second of each start

        super().__init__()
        if not Path(weights).is_file():
            raise FileNotFoundError(f"weights: the file '{weights}' of open_clip's {model} does not exist")
        name = f"local-dir:{model}" if Path(model).is_dir() else model
        if name == model and model not in open_clip.list_models():
            raise ValueError(f"model: open_clip knows no '{model}', expected one of open_clip.list_models()")
        _check_local(model)
        net = open_clip.create_model(
            name, pretrained=None, force_quick_gelu=quick_gelu, load_weights=False, output_dict=False
        )
        state = bare(read_weights(weights))
        check(state, {name: value.shape for name, value in net.state_dict().items()}, f"weights '{weights}'")
        net.load_state_dict(state)
        self.net = net.eval().requires_grad_(False)
        self.tokenizer = open_clip.get_tokenizer(name)
        self.weights_sha256 = sha256(weights)
        visual = cast(Any, net.visual)
        size = visual.image_size
        self.size = int(size[0] if isinstance(size, tuple) else size)
        cfg = open_clip.get_model_preprocess_cfg(net)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(cfg["mean"]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(cfg["std"]).view(3, 1, 1), persistent=False)
        self.model = model

    def image_features(self, image: Tensor) -> Tensor:
        """Map images (B, 3, H, W) in [-1, 1] to embeddings (B, E) before normalisation."""
        if image.shape[-1] != self.size:
            size = (self.size, self.size)
            image = F.interpolate(image, size, mode="bicubic", antialias=True).clamp(-1.0, 1.0)
        return cast(Tensor, self.net.encode_image(((image + 1.0) / 2.0 - self.mean) / self.std))

    @torch.no_grad()
    def encode_text(self, text: list[str]) -> Tensor:
        """Map B captions to unit vectors (B, E)."""
        tokens = self.tokenizer(text).to(next(self.net.parameters()).device)
        return F.normalize(self.net.encode_text(tokens), dim=-1)

    def metadata(self) -> Metadata:
        """Name model, weights and resizing."""
        import open_clip

        return {
            "implementation": f"open_clip {open_clip.__version__} {self.model}",
            "weights_sha256": self.weights_sha256,
            "resize": f"torch bicubic, antialias, to {self.size}",
        }


def network_metadata(network: Features) -> Metadata:
    """Return metadata of a network: its class, the SHA-256 of its weights, and how it resizes images."""
    found: Metadata = {"network": f"{type(network).__module__}.{type(network).__qualname__}"}
    if hasattr(network, "metadata"):
        return found | cast(Metadata, network.metadata())
    holder: Any = getattr(network, "module", network)  # a frozen network is no submodule
    state = holder.state_dict() if isinstance(holder, nn.Module) else {}
    size = getattr(holder, "image_size", None)
    resize = f"torch bicubic, antialias, to {size}" if size else "none"
    return found | {"weights_sha256": tensors_sha256(state), "resize": resize}


def _numbers(captions: list[str]) -> Tensor:
    hashes = (hashlib.blake2b(caption.encode(), digest_size=7).digest() for caption in captions)
    return torch.tensor([int.from_bytes(digest) for digest in hashes])


def _check_local(model: str) -> None:
    """Check that open_clip would look for nothing on the network."""
    import open_clip

    folder = Path(model)
    if folder.is_dir():
        found = read_json(folder / "open_clip_config.json")
        config = found.get("model_cfg", found)
    else:
        config = open_clip.get_model_config(model) or {}
    for key in ("hf_tokenizer_name", "hf_model_name"):
        name = config.get("text_cfg", {}).get(key)
        if name and not Path(name).is_dir():
            raise ValueError(
                f"model: {model} needs {key} '{name}' from the network, expected a model with CLIP's own "
                "tokens, or a folder whose open_clip_config.json names a local one"
            )

"""CLIP (Radford et al. 2021, arXiv:2103.00020): an open_clip model with its tokenizer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm.io.config import Configurable
from ldm.nets.text import VOCAB_SIZE, TextTower, tokenize
from ldm.types import send

TEXT_CFG = ("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio")
"""Keys of a ``text_cfg`` that a ``TextTower`` takes."""
POOLING = ("pool_type", "eos_id", "pad_id", "proj_type", "proj_bias", "output_tokens")
"""Keys of a ``text_cfg`` about what follows the last layer norm."""


class CLIPModel(Configurable, nn.Module):
    """An image tower and a text tower that meet in one space, built by open_clip from a configuration.

    Args:
        embed_dim: E, the width of the shared space.
        vision_cfg: open_clip's ``vision_cfg``: image_size, patch_size, width, layers, head_width ...
        text_cfg: open_clip's ``text_cfg``: context_length, width, heads, layers ...
        quick_gelu: Use the sigmoid approximation of GELU, as OpenAI's weights need.
        image_mean: What the image tower takes off the red, green and blue of an image in [0, 1]. Published
            weights need what they were trained with: OpenAI's and LAION's .48145466, .4578275, .40821073.
        image_std: What it then divides them by: with OpenAI's and LAION's .26862954, .26130258, .27577711.
        init_logit_bias: Start of the bias of logits that the ``Sigmoid`` loss learns, -10 in its paper; the
            logit scale then starts at 10, not at 1 / 0.07. None for a network without one.
    """

    image_scale: Tensor
    image_shift: Tensor

    def __init__(
        self,
        embed_dim: int,
        vision_cfg: dict[str, Any],
        text_cfg: dict[str, Any],
        quick_gelu: bool = False,
        image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
        image_std: tuple[float, float, float] = (0.5, 0.5, 0.5),
        init_logit_bias: float | None = None,
    ) -> None:
        import open_clip  # here: with timm and wandb, which it brings, it is a second of every other start

        super().__init__()
        try:
            self.model = open_clip.CLIP(
                embed_dim,
                dict(vision_cfg),
                dict(text_cfg),
                quick_gelu=quick_gelu,
                init_logit_scale=-math.log(0.07) if init_logit_bias is None else math.log(10.0),
                init_logit_bias=init_logit_bias,
                nonscalar_logit_scale=True,  # (1,): single numbers cannot be split among processes
            )
        except TypeError as error:
            raise ValueError(f"net.vision_cfg or net.text_cfg does not fit open_clip: {error}") from error
        self.model.register_load_state_dict_pre_hook(_numbers_to_vectors)
        self.text_cfg, self.quick_gelu = dict(text_cfg), quick_gelu
        self.image_mean, self.image_std = image_mean, image_std
        self.context_length = int(self.model.context_length)
        self.token_width = int(self.model.token_embedding.embedding_dim)
        size = open_clip.utils.to_2tuple(self.model.visual.image_size)  # one number in residual networks
        self.image_size = int(size[0])
        mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (image_mean, image_std))
        # (x + 1) / 2 is the image in [0, 1]; with mean and deviation .5 the tower gets x itself, to the bit
        self.register_buffer("image_scale", (0.5 / std).float(), persistent=False)
        self.register_buffer("image_shift", ((0.5 - mean) / std).float(), persistent=False)

    def tokenize(self, text: list[str]) -> Tensor:
        """Encode captions as byte pairs with begin and end marks; what does not fit is cut off.

        Returns:
            (B, L) int64 on the model's device, padded with 0.
        """
        return send(tokenize(text, self.context_length), self.model.logit_scale.device)

    def encode_image(self, image: Tensor) -> Tensor:
        """Map images (B, 3, H, W) in [-1, 1] to unit vectors (B, E)."""
        return F.normalize(self.image_features(image).float(), dim=-1)

    def image_features(self, image: Tensor) -> Tensor:
        """Map images (B, 3, H, W) in [-1, 1] to their embeddings (B, E) before normalisation."""
        if image.shape[-1] != self.image_size:
            size = (self.image_size, self.image_size)
            image = F.interpolate(image, size, mode="bicubic", antialias=True)
        with _attention_kernel():
            return self.model.encode_image(image * self.image_scale + self.image_shift)

    def encode_text(self, text: list[str]) -> Tensor:
        """Map B captions to unit vectors (B, E)."""
        with _attention_kernel():
            return F.normalize(self.model.encode_text(self.tokenize(text)).float(), dim=-1)

    def blocks(self) -> list[nn.Module]:
        """Return the blocks of the transformers; an image tower of another kind has none."""
        from open_clip.transformer import ResidualAttentionBlock

        return [module for module in self.modules() if isinstance(module, ResidualAttentionBlock)]

    def text_tower(self) -> TextTower:
        """Build the tower of the tokens after the last layer norm, with a copy of the weights.

        Raises:
            ValueError: If ``text_cfg`` needs more than the text tower of Radford et al. 2021.
        """
        if more := [key for key, value in self.text_cfg.items() if value and key not in TEXT_CFG + POOLING]:
            raise ValueError(
                f"net.text_cfg has {', '.join(more)}, expected of a tower that is to condition a denoiser "
                f"nothing but {', '.join(TEXT_CFG + POOLING)}"
            )
        if (found := int(self.model.vocab_size)) != VOCAB_SIZE:
            raise ValueError(f"net.text_cfg.vocab_size is {found}, expected {VOCAB_SIZE}, CLIP's byte pairs")
        blocks = self.model.transformer.resblocks
        mlp_ratio = blocks[0].mlp.c_fc.out_features / self.token_width
        heads = int(blocks[0].attn.num_heads)
        with torch.device("meta"):  # draws no random numbers: what is built next starts as it always did
            tower = TextTower(
                self.token_width, len(blocks), heads, self.context_length, mlp_ratio, self.quick_gelu
            )
        weights = text_weights(self.model.state_dict())
        tower.load_state_dict({name: value.clone() for name, value in weights.items()}, assign=True)
        return tower


NUMBERS = "logit_scale", "logit_bias"
"""Weights that are vectors (1,) here, and single numbers () in files of open_clip."""


def _numbers_to_vectors(module: nn.Module, weights: dict[str, Tensor], prefix: str, *args: Any) -> None:
    """Before weights are loaded, turn single numbers into vectors."""
    for name in NUMBERS:
        if (value := weights.get(prefix + name)) is not None:
            weights[prefix + name] = value.reshape(1)


RENAMED = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
"""Parts of a layer of open_clip's text transformer, and what ``TextTower`` calls them."""


def text_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Pick the text tower out of an open_clip model's state dict, under ``TextTower``'s names.

    Args:
        weights: Of an ``open_clip.CLIP``. What does not belong to the tower up to its last norm is left out.
    """
    tower = {
        "embeddings.token_embedding.weight": weights["token_embedding.weight"],
        "embeddings.position_embedding.weight": weights["positional_embedding"],
        "final_layer_norm.weight": weights["ln_final.weight"],
        "final_layer_norm.bias": weights["ln_final.bias"],
    }
    for name, value in weights.items():
        if name.startswith("transformer.resblocks."):
            number, key = name.removeprefix("transformer.resblocks.").split(".", 1)
            tower |= {f"encoder.layers.{number}.{k}": v for k, v in _renamed(key, value).items()}
    return tower


def _renamed(key: str, value: Tensor) -> dict[str, Tensor]:
    """Rename one parameter of a layer; the joint projection (3 D, ...) becomes three."""
    kind = key.rpartition("_" if key.startswith("attn.in_proj") else ".")[2]  # weight or bias
    if key.startswith("attn.in_proj"):
        return {f"self_attn.{p}_proj.{kind}": v for p, v in zip("qkv", value.chunk(3), strict=True)}
    return {f"{RENAMED[key.removesuffix(f'.{kind}')]}.{kind}": value}


def _attention_kernel() -> AbstractContextManager[None]:
    # torch's fused CPU kernel takes 15 times as long backwards in bfloat16; see also nets.attention.attend
    return sdpa_kernel(SDPBackend.MATH) if torch.is_autocast_enabled("cpu") else nullcontext()

"""CLIP (Radford et al. 2021, arXiv:2103.00020): an open_clip model with its tokenizer."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


class CLIPModel(nn.Module):
    """An image tower and a text tower that meet in one space, built by open_clip from a configuration.

    Pictures are in [-1, 1], which is open_clip's ``mean = std = 0.5``.

    Args:
        embed_dim: E, the width of the shared space.
        vision_cfg: open_clip's ``vision_cfg``: image_size, patch_size, width, layers, head_width ...
        text_cfg: open_clip's ``text_cfg``: context_length, width, heads, layers ...
        quick_gelu: Use the sigmoid approximation of GELU, as OpenAI's weights need.
    """

    def __init__(
        self, embed_dim: int, vision_cfg: dict[str, Any], text_cfg: dict[str, Any], quick_gelu: bool = False
    ) -> None:
        super().__init__()
        try:
            self.model = open_clip.CLIP(embed_dim, dict(vision_cfg), dict(text_cfg), quick_gelu=quick_gelu)
        except TypeError as error:
            raise ValueError(f"net.vision_cfg or net.text_cfg does not fit open_clip: {error}") from error
        self.context_length = int(self.model.context_length)
        self.token_width = int(self.model.token_embedding.embedding_dim)
        self.image_size = int(self.model.visual.image_size[0])

    def tokenize(self, text: list[str]) -> Tensor:
        """Encode captions as byte pairs with begin and end marks; what does not fit is cut off.

        Returns:
            (B, L) int64 on the model's device, padded with 0.
        """
        rows = [_tokenize(caption, self.context_length) for caption in text]
        return torch.tensor(rows, device=self.model.logit_scale.device)

    def num_tokens(self, caption: str) -> int:
        """Count the tokens of a caption with its begin and end marks."""
        return len(_tokenizer().encode(caption)) + 2

    def encode_image(self, image: Tensor) -> Tensor:
        """Map pictures (B, 3, H, W) in [-1, 1] to unit vectors (B, E)."""
        return F.normalize(self.image_features(image).float(), dim=-1)

    def image_features(self, image: Tensor) -> Tensor:
        """Map pictures (B, 3, H, W) in [-1, 1] to their embeddings (B, E) before normalisation."""
        if image.shape[-1] != self.image_size:
            size = (self.image_size, self.image_size)
            image = F.interpolate(image, size, mode="bicubic", antialias=True)
        with _attention_kernel():
            return self.model.encode_image(image)

    def encode_text(self, text: list[str]) -> Tensor:
        """Map B captions to unit vectors (B, E)."""
        with _attention_kernel():
            return F.normalize(self.model.encode_text(self.tokenize(text)).float(), dim=-1)

    def text_tokens(self, text: list[str]) -> Tensor:
        """Map B captions to the sequence (B, L, D) after the text tower's last layer norm."""
        model = self.model
        hidden = model.token_embedding(self.tokenize(text)) + model.positional_embedding
        with _attention_kernel():
            return model.ln_final(model.transformer(hidden, attn_mask=model.attn_mask))


def _attention_kernel() -> AbstractContextManager[None]:
    # torch's fused CPU kernel takes 15 times as long backwards in bfloat16; see also nets.attention.attend
    return sdpa_kernel(SDPBackend.MATH) if torch.is_autocast_enabled("cpu") else nullcontext()


@lru_cache(maxsize=1)
def _tokenizer() -> SimpleTokenizer:
    return SimpleTokenizer()


@lru_cache(maxsize=1 << 17)
def _tokenize(caption: str, context_length: int) -> list[int]:
    return _tokenizer()([caption], context_length)[0].tolist()

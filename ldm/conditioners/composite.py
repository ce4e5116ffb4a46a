"""Several conditions at once."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ldm.conditioners.base import Conditioner
from ldm.latents.space import LatentSpace
from ldm.rng import SampleNoise
from ldm.types import Batch, Cond


class Composite(Conditioner):
    """Several conditioners: tokens and map channels are concatenated, vectors added.

    Each conditioner drops out by its own ``dropout``, independently; ``dropout`` here drops all at once. The
    null condition keeps what training never drops: guidance by a caption leaves an image to be inpainted
    alone, since the model has never met a caption without one.

    Args:
        conditioners: What conditions; their order is that of tokens and channels.
        dropout: Fraction of training samples that get none of the conditions.
        token_width: Width that the tokens of each are projected to, by learned matrices; None takes them as
            they are, all of one width.
    """

    def __init__(
        self, conditioners: list[Conditioner], dropout: float = 0.0, token_width: int | None = None
    ) -> None:
        super().__init__(dropout)
        if not conditioners:
            raise ValueError("conditioner.conditioners is empty, expected at least one conditioner")
        self.conditioners = nn.ModuleList(conditioners)
        self.reads = tuple(dict.fromkeys(field for member in conditioners for field in member.reads))
        self.vector_width = _vector_width(conditioners)
        self.token_width = _token_width(conditioners, token_width)
        lengths = [member.context_length for member in conditioners if member.context_length is not None]
        self.context_length = min(lengths, default=None)
        self.projections = nn.ModuleList(_projection(member, token_width) for member in conditioners)

    @property
    def members(self) -> list[Conditioner]:
        """The conditioners, in order."""
        return cast(list[Conditioner], list(self.conditioners))

    def bind(self, latents: LatentSpace) -> None:
        """Bind each to the latent space, and add up their channels."""
        for member in self.members:
            member.bind(latents)
        self.spatial_channels = sum(member.spatial_channels for member in self.members)

    def reads_stored(self, stored: Collection[str]) -> tuple[str, ...]:
        """Name the fields of each; text embeddings only if they can be of one encoder alone."""
        usable = [name for name in stored if name != "text_embedding" or self.text_encoder is not None]
        fields = (field for member in self.members for field in member.reads_stored(usable))
        return tuple(dict.fromkeys(fields))

    @property
    def text_encoder(self) -> dict[str, Any] | None:
        """That of the only member that has one."""
        found = [member.text_encoder for member in self.members if member.text_encoder is not None]
        return found[0] if len(found) == 1 else None

    def forward(self, batch: Batch) -> Cond:
        """Encode what each conditioner reads."""
        return self._join([member(batch) for member in self.members])

    def null(self, batch: Batch) -> Cond:
        """Return the null conditions of those that training drops; of all if it drops none."""
        spares = self.drops and self.dropout == 0.0
        return self._join(
            [
                member(batch)
                if spares and not member.drops and not _is_negative(member, batch)
                else member.null(batch)
                for member in self.members
            ]
        )

    def dropped(self, batch: Batch, noise: SampleNoise) -> Cond:
        """Encode with each conditioner's own dropout, and then with the one of all."""
        return self._drop(self._join([member.dropped(batch, noise) for member in self.members]), batch, noise)

    def check(self, batch: Batch) -> None:
        """Let each conditioner check the batch."""
        for member in self.members:
            member.check(batch)

    def truncated(self, batch: Batch) -> dict[str, Tensor]:
        """Join the fractions of all conditioners."""
        return {
            name: fraction for member in self.members for name, fraction in member.truncated(batch).items()
        }

    def check_values(self, batch: Batch) -> None:
        """Let each conditioner check the classes in the batch."""
        for member in self.members:
            member.check_values(batch)

    @property
    def classes(self) -> dict[str, int]:
        """Classes that each conditioner of a field knows."""
        found: dict[str, int] = {}
        for member in self.members:
            found |= {field: min(count, found.get(field, count)) for field, count in member.classes.items()}
        return found

    @property
    def drops(self) -> bool:
        """Whether training uses the null condition of any."""
        return self.dropout > 0.0 or any(member.drops for member in self.members)

    @property
    def model_folders(self) -> dict[str, str]:
        """Folders of other programs' models, with the SHA-256 of their files."""
        return {path: sha for member in self.members for path, sha in member.model_folders.items()}

    @property
    def upstream(self) -> dict[str, str]:
        """Checkpoints that the conditioners are built on, with their SHA-256."""
        return {path: sha for member in self.members for path, sha in member.upstream.items()}

    def _join(self, conds: Sequence[Cond]) -> Cond:
        tokens, masks = [], []
        for cond, project in zip(conds, self.projections, strict=True):
            if cond.tokens is not None:
                tokens.append(project(cond.tokens))
                masks.append(cond.mask)
        vectors = [cond.vector for cond in conds if cond.vector is not None]
        maps = [cond.spatial for cond in conds if cond.spatial is not None]
        return Cond(
            torch.cat(tokens, dim=1) if tokens else None,
            _join_masks(tokens, masks),
            torch.stack(vectors).sum(0) if vectors else None,
            _join_maps(maps),
        )


def _is_negative(member: Conditioner, batch: Batch) -> bool:
    """Whether the null condition of a conditioner is that of captions to guide away from."""
    return "negative_text" in batch and "text" in member.reads


def _join_masks(tokens: list[Tensor], masks: list[Tensor | None]) -> Tensor | None:
    if all(mask is None for mask in masks):
        return None
    filled = [
        torch.ones(token.shape[:2], dtype=torch.bool, device=token.device) if mask is None else mask
        for token, mask in zip(tokens, masks, strict=True)
    ]
    return torch.cat(filled, dim=1)


def _join_maps(maps: list[Tensor]) -> Tensor | None:
    sizes = [tuple(spatial.shape[2:]) for spatial in maps]
    if len(set(sizes)) > 1:
        raise ValueError(
            f"conditioner.conditioners: their maps have sizes {sizes}, expected one size for all"
        )
    return torch.cat(maps, dim=1) if maps else None


def _vector_width(members: Sequence[Conditioner]) -> int | None:
    widths = [member.vector_width for member in members if member.vector_width is not None]
    if len(set(widths)) > 1:
        raise ValueError(
            f"conditioner.conditioners: vectors of widths {widths} cannot be added, expected one width"
        )
    return widths[0] if widths else None


def _token_width(members: Sequence[Conditioner], projected: int | None) -> int | None:
    widths = [member.token_width for member in members if member.token_width is not None]
    if not widths:
        return None
    if projected is None and len(set(widths)) > 1:
        raise ValueError(
            f"conditioner.conditioners: tokens have widths {widths}, expected one width for all: set "
            "conditioner.token_width to project them"
        )
    return projected or widths[0]


def _projection(conditioner: Conditioner, token_width: int | None) -> nn.Module:
    if conditioner.token_width is None or token_width is None:
        return nn.Identity()
    return nn.Linear(conditioner.token_width, token_width, bias=False)

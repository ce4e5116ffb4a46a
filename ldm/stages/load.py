"""Build a stage from its configuration, or from a checkpoint alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ldm.io.checkpoint import Checkpoint, instantiate
from ldm.io.upstream import open_upstream, rebuilding
from ldm.nets.clip import CLIPModel
from ldm.nets.frozen import Frozen
from ldm.stages.stage import Stage

S = TypeVar("S", bound=Stage)


def build_stage(config: dict[str, Any]) -> Stage:
    """Build ``{"class_path": ..., "init_args": {...}}``, checked like a YAML file.

    The stage keeps ``config``, so that its checkpoints can rebuild it.
    """
    stage, complete = instantiate(config, Stage)  # type: ignore[type-abstract]
    stage.config = complete
    return stage


def load_stage(source: str | Path | Checkpoint, expected: type[S]) -> S:
    """Rebuild a stage from its checkpoint, with averaged weights where it has them.

    Args:
        source: Checkpoint, or the path of its file or run folder.
        expected: Class of the stage.

    Returns:
        The stage on the CPU, in eval mode.

    Raises:
        FileNotFoundError: If there is no checkpoint, here or upstream.
        ValueError: If it is damaged or of another stage.
    """
    name = getattr(expected, "name", None)
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint.open(source, name)
    with rebuilding(checkpoint):
        stage = build_stage(checkpoint.state["config"])
    if not isinstance(stage, expected):
        raise ValueError(
            f"checkpoint '{checkpoint.file}' is of a {type(stage).__name__}, expected a {expected.__name__}"
        )
    stage.load_trained(checkpoint.state)
    return stage.eval()


class CLIPTower(Frozen[CLIPModel]):
    """Image and text tower of a trained CLIP stage, frozen, for metrics.

    Args:
        checkpoint: Checkpoint or run folder of a CLIP stage.
    """

    def __init__(self, checkpoint: str) -> None:
        super().__init__(open_upstream(checkpoint, "clip").load_net(CLIPModel))

    @classmethod
    def of(cls, net: CLIPModel) -> CLIPTower:
        """Take the towers of a stage that is loaded."""
        tower = cls.__new__(cls)
        Frozen.__init__(tower, net)
        return tower

    @property
    def context_length(self) -> int:
        """Most tokens of a caption that are read."""
        return self.module.context_length

    @torch.no_grad()
    def encode_image(self, image: Tensor) -> Tensor:
        """Map images (B, 3, H, W) in [-1, 1] to unit vectors (B, E)."""
        return self.module.encode_image(image)

    @torch.no_grad()
    def encode_text(self, text: list[str]) -> Tensor:
        """Map B captions to unit vectors (B, E)."""
        return self.module.encode_text(text)

    def image_features(self, image: Tensor) -> Tensor:
        """Map images (B, 3, H, W) in [-1, 1] to embeddings (B, E) before normalisation."""
        return self.module.image_features(image)

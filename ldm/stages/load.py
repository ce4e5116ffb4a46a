"""Build a stage from its configuration, or from a checkpoint alone."""

from __future__ import annotations

from typing import Any, TypeVar

import jsonargparse
import torch
from torch import Tensor

from ldm.io import checkpoint as ckpt
from ldm.nets.clip import CLIPModel
from ldm.nets.frozen import Frozen
from ldm.stages.stage import Stage

S = TypeVar("S", bound=Stage)


def build_stage(config: dict[str, Any]) -> Stage:
    """Build ``{"class_path": ..., "init_args": {...}}``, checked like a YAML file.

    The stage remembers ``config``, so that its checkpoints can rebuild it.
    """
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Stage, "stage", required=True)
    parsed = parser.parse_object({"stage": config})
    stage = parser.instantiate(parsed).stage
    stage.config = parsed.stage.as_dict()
    return stage


def load_stage(path: str, expected: type[S]) -> S:
    """Rebuild a stage from a checkpoint file or run folder, with averaged weights where it has them.

    Returns:
        The stage on the CPU, in eval mode.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        ValueError: If it is damaged or of another stage.
    """
    state = ckpt.read(path, stage=getattr(expected, "name", None))
    stage = build_stage(state["config"])
    if not isinstance(stage, expected):
        raise ValueError(
            f"checkpoint '{path}' is of a {type(stage).__name__}, expected a {expected.__name__}"
        )
    stage.load_trained(state)
    return stage.eval()


class CLIPTower(Frozen[CLIPModel]):
    """The two towers of a trained CLIP stage, frozen: what metrics measure with.

    Args:
        checkpoint: Checkpoint or run folder of a CLIP stage.
    """

    def __init__(self, checkpoint: str) -> None:
        super().__init__(ckpt.load_net(checkpoint, "clip", CLIPModel)[0])

    @torch.no_grad()
    def encode_image(self, image: Tensor) -> Tensor:
        """Map images (B, 3, H, W) in [-1, 1] to unit vectors (B, E)."""
        return self.module.encode_image(image)

    @torch.no_grad()
    def encode_text(self, text: list[str]) -> Tensor:
        """Map B captions to unit vectors (B, E)."""
        return self.module.encode_text(text)

    @torch.no_grad()
    def image_features(self, image: Tensor) -> Tensor:
        """Map images (B, 3, H, W) in [-1, 1] to embeddings (B, E) before normalisation."""
        return self.module.image_features(image)

"""The stage of a configuration, with networks of its upstream runs' shapes in place of their checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from ldm import ROOMS, import_exports
from ldm.conditioners.text import TowerText
from ldm.io.checkpoint import instantiate
from ldm.latents.space import LatentSpace
from ldm.losses.lpips import LPIPS
from ldm.nets.autoencoder import KLAutoencoder
from ldm.nets.clip import CLIPModel
from ldm.nets.frozen import Frozen
from ldm.nets.lpips import CHANNELS, TAPS, LPIPSNet, trunk
from ldm.runs.recipe import CONFIGS, merged
from ldm.stage_protocols import Progress
from ldm.stages.stage import Stage
from ldm.types import Batch, kind_of_channels

LATE = 10**12
"""Samples after which every loss term has begun."""


class StoredLatents(LatentSpace):
    """Latents that ``ldm.encode`` stored, of an autoencoder with random weights.

    Args:
        net: The autoencoder.
        image_size: Side of the images that it was trained on; None if it is not given.
    """

    def __init__(self, net: KLAutoencoder, image_size: int | None = None) -> None:
        super().__init__()
        self.image_size = image_size
        self.net = Frozen(net)
        self.channels, self.factor, self.image_channels = net.latent_channels, net.factor, net.image_channels
        self.image_kind = kind_of_channels(net.image_channels)

    @override
    def reads(self, stored: Any) -> tuple[str, ...]:
        return ("latent",)

    @override
    @torch.no_grad()
    def encode(self, batch: Batch, noise: Tensor) -> Tensor:
        if "latent" in batch:
            mean, std = batch["latent"].float().chunk(2, dim=1)
        else:  # what a condition shows of an image
            posterior = self.net.module.encode(batch["image"])
            mean, std = posterior.mean.float(), posterior.std.float()
        return mean + std * noise

    @override
    def decode(self, latent: Tensor) -> Tensor:
        raise NotImplementedError("training decodes nothing")


class NewCLIPText(TowerText):
    """Tokens of the text tower of a CLIP with random weights.

    Args:
        net: The CLIP.
        dropout: As of CLIPText.
        frozen: As of CLIPText.
        clip_skip: As of CLIPText.
    """

    def __init__(self, net: CLIPModel, dropout: float = 0.1, frozen: bool = True, clip_skip: int = 0) -> None:
        super().__init__(net.text_tower().clip_skip(clip_skip), dropout, frozen, {})


INSTEAD = {"AutoencoderLatents": StoredLatents, "CLIPText": NewCLIPText}
"""What takes the place of classes that read a checkpoint."""


class NewLPIPS(LPIPSNet):
    """LPIPS with random weights."""

    def __init__(self, net: Any) -> None:
        nn.Module.__init__(self)
        self.taps, self.features = TAPS[net], trunk(net)
        for i, channels in enumerate(CHANNELS[net]):
            self.register_buffer(f"head{i}", torch.ones(1, channels, 1, 1))
        for name in ("shift", "scale"):
            self.register_buffer(name, torch.ones(3, 1, 1))
        self.eval().requires_grad_(False)

    @override
    def to(self, *args: Any, **kwargs: Any) -> NewLPIPS:
        return self  # it lies where the stage does


class Unallocated(TorchFunctionMode):
    """Gives what layers allocate for their weights no memory; tables that are computed get theirs."""

    @override
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.empty:
            kwargs = {**(kwargs or {}), "device": "meta"}
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Planned:
    """A stage, and what its configuration says of samples.

    Args:
        stage: In training mode, its weights on the meta device or anywhere.
        side: Of the images.
        batch: Samples of a process.
    """

    stage: Stage
    side: int
    batch: int


def build(name: str) -> Planned:
    """Build the stage of a configuration, as late in training as loss terms need.

    Args:
        name: A file, or a name such as diffusion/sd1.

    Raises:
        ValueError: If an upstream run has no configuration, or something else needs a checkpoint.
    """
    import_exports(ROOMS)
    config = merged(name)
    if "model" not in config:
        raise ValueError(f"{name}: got no model, expected the configuration of a stage")
    with Unallocated():
        try:
            stage, _ = instantiate(_without_checkpoints(config["model"]), Stage)  # type: ignore[type-abstract]
        except FileNotFoundError as error:
            raise ValueError(f"{name}: needs a checkpoint to be counted: {error}") from error
        for term in stage.loss_terms:
            if isinstance(term, LPIPS):
                term._network = Frozen(NewLPIPS(term.net))
    stage.progress = Progress(samples=LATE)
    data = config.get("data", {})
    side = data.get("image_size") or stage.image_size
    if side is None:
        raise ValueError(f"{name}: data.image_size: got none, expected the side of the images")
    return Planned(stage.train(), side, data.get("batch_size", 1))


def _without_checkpoints(value: Any) -> Any:
    """Replace the classes that read a checkpoint, at any depth."""
    if isinstance(value, list):
        return [_without_checkpoints(each) for each in value]
    if not isinstance(value, dict):
        return value
    arguments = value.get("init_args", {})
    short = str(value.get("class_path", "")).rpartition(".")[2]
    if short not in INSTEAD:
        return {key: _without_checkpoints(each) for key, each in value.items()}
    rest = {key: each for key, each in arguments.items() if key != "checkpoint"}
    trained, owner = upstream(arguments["checkpoint"]), INSTEAD[short]
    rest["net"] = trained["model"]["init_args"]["net"]
    if owner is StoredLatents:
        rest["image_size"] = trained["data"].get("image_size")
    return {"class_path": f"{owner.__module__}.{owner.__name__}", "init_args": rest}


def upstream(run: str) -> dict[str, Any]:
    """Return the configuration whose run folder another one names.

    Raises:
        ValueError: If none of this package has it.
    """
    for path in sorted(CONFIGS.rglob("*.yaml")):
        if (yaml.safe_load(path.read_text(encoding="utf-8")) or {}).get("run") == run:
            return merged(str(path))
    raise ValueError(f"checkpoint: got {run}, expected the run folder of a configuration in {CONFIGS.name}/")

"""One network of a single file: its weights under our names, checked, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm.interop.compvis_keys import Pairs, names
from ldm.interop.model import Network
from ldm.io.weights import check

Weights = Mapping[str, Tensor]


def network(
    theirs: Weights, build: Callable[[], nn.Module], arguments: dict[str, Any], modules: Pairs, name: str
) -> Network:
    """Rename the weights of the network that ``build`` makes, and check their shapes.

    Args:
        theirs: By CompVis's names, without prefix.
        build: Makes the network.
        arguments: What it is made with.
        modules: Our names of its modules and theirs.
        name: The file, for messages.

    Raises:
        ValueError: If a weight is missing, too much, or of another shape.
    """
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in build().state_dict().items()}
    known = names(shapes, modules)
    check(theirs, {known[key]: shape for key, shape in shapes.items()}, name)
    return Network(arguments, {key: theirs[known[key]].float() for key in shapes})


def renamed(weights: Weights, modules: Pairs, prefix: str) -> dict[str, Tensor]:
    """Give our weights CompVis's names."""
    return {f"{prefix}{theirs}": weights[key] for key, theirs in names(weights, modules).items()}

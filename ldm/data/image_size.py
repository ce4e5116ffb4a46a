"""Size of an image and what is shown of it, a field of its own: see ``Batch.size``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.data.decode import Decoded, Members
from ldm.data.raster import stored_size

ORIGINAL = ("original_height", "original_width")
"""Keys of the json member, as img2dataset writes them: the size of the image before it was resized."""


def decode_size(members: Members) -> Decoded | None:
    """Decode the size of the image and what is shown of it, (6,) float32."""
    meta = members.json()
    stored = _stated(meta, ("height", "width"), members)
    images = [name for name in members.content if name != "json"]
    if stored is None and images:
        try:
            stored = stored_size(members.content[images[0]])
        except ValueError as error:
            raise members.bad(images[0], str(error), "unreadable image") from error
    if stored is None:
        return None
    view, original = members.view, _stated(meta, ORIGINAL, members) or stored
    top, left, high, wide = view.box(*stored)
    corner = round(top * view.height / high), round(left * view.width / wide)
    return Decoded(torch.tensor([*original, *corner, view.height, view.width], dtype=torch.float32))


def uncropped(height: int, width: int) -> Tensor:
    """Return what ``size`` gives of an image that is shown as it is: (6,) float32."""
    return torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32)


def _stated(meta: Mapping[str, Any], keys: tuple[str, str], members: Members) -> tuple[int, int] | None:
    """Return height and width that the json member states; None if it does not."""
    found = [meta.get(key) for key in keys]
    if found == [None, None]:
        return None
    height, width = (side if isinstance(side, int) and side > 0 else 0 for side in found)
    if not (height and width):
        what = f"{' and '.join(map(repr, keys))} are {found!r:.60}, expected two integers above 0"
        raise members.bad("json", what, "malformed size")
    return height, width

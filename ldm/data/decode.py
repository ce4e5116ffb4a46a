"""Bytes to samples: a pure function of the members of a sample, by a whitelist of member names.

Nothing here unpickles, runs a program or touches a file: a member that the whitelist lacks is not read.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import numpy as np
import torch
from torch import Tensor

from ldm.data import raster

Field = Literal["image", "text", "label", "latent", "mask", "low_res", "label_map", "layout"]
"""What a sample can carry beside its key."""
FIELDS: tuple[Field, ...] = ("image", "text", "label", "latent", "mask", "low_res", "label_map", "layout")

IMAGES = ("jpg", "jpeg", "png", "webp")
LATENT = "latent.npy"
MEMBERS: dict[str, tuple[str, ...]] = {
    "image": IMAGES,
    "text": ("txt", "json"),
    "label": ("cls", "json"),
    "latent": (LATENT,),
    "mask": ("mask.png",),
    "low_res": ("low.png", "low.jpg"),
    "label_map": ("map.png",),
    "layout": ("json",),
}
"""Members that a field is read from."""
EXTENSIONS = (*IMAGES, "txt", "json", "cls", LATENT, "mask.png", "low.png", "low.jpg", "map.png")
"""The whitelist: everything that is ever read from a shard."""


class BadSample(ValueError):
    """A sample that cannot be used. The message names shard, key, member and reason."""


class Sample(TypedDict, total=False):
    """One decoded sample; a field that was not asked for is absent."""

    key: str
    image: Tensor
    """(3, S, S) uint8 in [0, 255], RGB."""
    text: str
    label: int
    latent: Tensor
    """(2 C, h, w) float32: mean and standard deviation of q(z | image)."""
    mask: Tensor
    """(1, S, S) uint8, 1 = to be painted."""
    low_res: Tensor
    """(3, s, s) uint8 in [0, 255]."""
    label_map: Tensor
    """(S, S) uint8."""
    layout: Tensor
    """(n, 5) float32: class, left, top, right, bottom in [0, 1]."""
    skipped: list[str]
    """Why other samples were replaced by this one (training only)."""


@dataclass(frozen=True)
class Origin:
    """Where a sample comes from, for messages.

    Args:
        shard: File name of the shard.
        key: Name of the sample in the shard.
    """

    shard: str
    key: str

    def bad(self, member: str, reason: str) -> BadSample:
        """Make the error for one member of this sample."""
        return BadSample(f"{self.shard}: sample '{self.key}', member '{member}': {reason}")


def wanted(fields: Iterable[str]) -> tuple[str, ...]:
    """List the members to read for ``fields``."""
    names = {name for field in fields for name in MEMBERS[field]}
    return tuple(name for name in EXTENSIONS if name in names)


def decode(
    members: Mapping[str, bytes], origin: Origin, fields: Iterable[str], image_size: int, draw: int | None
) -> Sample:
    """Decode the asked fields of one sample.

    Args:
        members: Member name ("jpg", "txt", ...) to its bytes.
        origin: Where the sample comes from.
        fields: Any of ``FIELDS``. An image is decoded only if "image" is among them.
        image_size: Side S of the image in pixels, and of what lies on it; the low-resolution image
            keeps its own.
        draw: A random number of 63 bits that chooses among several captions (training), or None to take
            the canonical caption (evaluation).

    Raises:
        BadSample: If a field is missing or cannot be decoded, a caption is empty, or what lies on the
            image has other proportions.
    """
    sample: Sample = {"key": origin.key}
    sizes: dict[str, tuple[int, int]] = {}
    for field in fields:
        if field == "text":
            sample["text"] = _text(members, origin, draw)
        elif field == "label":
            sample["label"] = _label(members, origin)
        elif field == "latent":
            sample["latent"] = _latent(members, origin)
        elif field == "layout":
            sample["layout"], sizes[field] = _layout(members, origin)
        else:
            sample[field], sizes[field] = _on_square(field, members, origin, image_size)  # type: ignore[literal-required]
    _check_proportions(sizes, members, origin)
    return sample


def json_fields(members: Mapping[str, bytes], origin: Origin) -> set[str]:
    """Return which of text, label and layout the json member of a sample gives."""
    meta = _json(members, origin)
    found = {"text"} if "caption" in meta or "captions" in meta else set()
    return found | ({"label", "layout"} & set(meta))


def _on_square(
    field: str, members: Mapping[str, bytes], origin: Origin, image_size: int
) -> tuple[Tensor, tuple[int, int]]:
    """Return what a raster holds of the image's central square, and the raster's height and width."""
    if field == "image":
        whole = _raster(field, raster.rgb, members, origin)
        found = raster.square(whole, image_size)
    elif field == "low_res":
        whole = _raster(field, raster.rgb, members, origin)
        found = raster.square(whole, None)
    elif field == "mask":
        whole = _raster(field, raster.mask, members, origin)
        found = raster.square(whole, image_size, "nearest-exact")
    else:
        whole = _raster(field, raster.classes, members, origin)
        found = raster.square(whole, image_size, "nearest-exact")[0]
    return found, (whole.shape[1], whole.shape[2])


_SQUARE = (1, 1)
"""Height and width of an image of which nothing is said."""


def _check_proportions(
    sizes: Mapping[str, tuple[int, int]], members: Mapping[str, bytes], origin: Origin
) -> None:
    """Check that all that lies on the image has its proportions: or the central square would be another."""
    if "image" not in sizes or len(sizes) == 1:
        return
    height, width = sizes["image"]
    for field, (h, w) in sizes.items():
        rounding = 0 if (h, w) == _SQUARE else max(height, width, h, w)  # to whole pixels, where resized
        if abs(width * h - w * height) > rounding:
            name = next(name for name in MEMBERS[field] if name in members)
            what = "'width' and 'height' are" if field == "layout" else "is"
            raise origin.bad(name, f"{what} {w}x{h}, expected the proportions of the image, {width}x{height}")


def _raster(
    field: str, read: Callable[[bytes], Tensor], members: Mapping[str, bytes], origin: Origin
) -> Tensor:
    name = next((name for name in MEMBERS[field] if name in members), None)
    if name is None:
        raise _missing(field, members, origin)
    try:
        return read(members[name])
    except ValueError as error:
        raise origin.bad(name, str(error)) from error


def _text(members: Mapping[str, bytes], origin: Origin, draw: int | None) -> str:
    meta = _json(members, origin) if "json" in members and (draw is not None or "txt" not in members) else {}
    captions = meta.get("captions")
    if captions is not None and (draw is not None or "txt" not in members):
        if not isinstance(captions, list) or not captions or not all(isinstance(c, str) for c in captions):
            raise origin.bad("json", f"'captions' is {captions!r:.60}, expected a list of strings")
        return _caption(captions[(draw or 0) % len(captions)], "json", origin)
    if "txt" in members:
        try:
            return _caption(members["txt"].decode("utf-8"), "txt", origin)
        except UnicodeDecodeError as error:
            raise origin.bad("txt", f"is not UTF-8 ({error.reason} at byte {error.start})") from error
    if "caption" in meta:
        return _caption(meta["caption"], "json", origin)
    raise _missing("text", members, origin)


def _caption(text: Any, member: str, origin: Origin) -> str:
    if not isinstance(text, str):
        raise origin.bad(member, f"the caption is {text!r:.60}, expected a string")
    caption = text.strip()
    if not caption:
        raise origin.bad(member, "the caption is empty")
    return caption


def _label(members: Mapping[str, bytes], origin: Origin) -> int:
    if "cls" in members:
        name, value = "cls", members["cls"].decode("utf-8", "replace").strip()
        label = int(value) if value.isascii() and value.isdigit() else value
    elif "label" in (meta := _json(members, origin) if "json" in members else {}):
        name, label = "json", meta["label"]
    else:
        raise _missing("label", members, origin)
    if not isinstance(label, int) or isinstance(label, bool) or label < 0:
        raise origin.bad(name, f"the label is {label!r:.60}, expected an integer >= 0")
    return label


def _layout(members: Mapping[str, bytes], origin: Origin) -> tuple[Tensor, tuple[int, int]]:
    """Return the boxes on the central square, (n, 5), and the image's height and width."""
    meta = _json(members, origin) if "json" in members else {}
    if "layout" not in meta:
        raise _missing("layout", members, origin)
    height, width = meta.get("height", _SQUARE[0]), meta.get("width", _SQUARE[1])
    try:
        rows = [(_class(item["label"]), *_box(item["box"])) for item in meta["layout"]]
        boxes = torch.tensor(rows, dtype=torch.float32).reshape(-1, 5)
        return _cropped(boxes, int(height), int(width)), (int(height), int(width))
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        expected = 'expected a list of {"label": 3, "box": [left, top, right, bottom]}, fractions in [0, 1]'
        raise origin.bad("json", f"'layout' is {meta['layout']!r:.80} ({error!r:.60}), {expected}") from error


def _cropped(boxes: Tensor, height: int, width: int) -> Tensor:
    """Move boxes from the image to its central square; those that lie outside are left out."""
    corners = boxes[:, 1:]
    if not ((corners > -1e-3) & (corners < 1.001)).all() or not (corners[:, :2] < corners[:, 2:]).all():
        raise ValueError("a box is empty or outside")
    if height < 1 or width < 1:
        raise ValueError(f"the image is {width}x{height}")
    side, (top, left) = min(height, width), raster.corner(height, width)
    scale = torch.tensor([width, height, width, height]) / side
    moved = corners * scale - torch.tensor([left, top, left, top]) / side
    boxes = torch.cat([boxes[:, :1], moved.clamp(0.0, 1.0)], dim=1)
    return boxes[(boxes[:, 1:3] < boxes[:, 3:]).all(1)]


def _box(box: Any) -> tuple[float, float, float, float]:
    left, top, right, bottom = map(float, box)
    return left, top, right, bottom


def _class(label: Any) -> int:
    if not isinstance(label, int) or isinstance(label, bool) or label < 0:
        raise ValueError(f"the label is {label!r:.20}")
    return label


def _latent(members: Mapping[str, bytes], origin: Origin) -> Tensor:
    if LATENT not in members:
        raise _missing("latent", members, origin)
    try:
        array = np.load(io.BytesIO(members[LATENT]), allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise origin.bad(LATENT, f"cannot be read as a numpy array ({error})") from error
    if array.ndim != 3 or array.shape[0] % 2 or array.dtype not in (np.float16, np.float32):
        found = f"{array.dtype} of shape {array.shape}"
        raise origin.bad(LATENT, f"is {found}, expected float16 or float32 of shape (2C, h, w)")
    latent = torch.from_numpy(array.astype(np.float32))
    if not torch.isfinite(latent).all():
        raise origin.bad(LATENT, "holds values that are not finite")
    return latent


def _json(members: Mapping[str, bytes], origin: Origin) -> dict[str, Any]:
    try:
        meta = json.loads(members["json"])
    except ValueError as error:
        raise origin.bad("json", f"is not JSON ({error})") from error
    if not isinstance(meta, dict):
        raise origin.bad("json", f"is a {type(meta).__name__}, expected an object")
    return meta


def _missing(field: str, members: Mapping[str, bytes], origin: Origin) -> BadSample:
    found = ", ".join(members) or "none of them"
    return origin.bad(" or ".join(MEMBERS[field]), f"missing: it gives the field '{field}' (found {found})")

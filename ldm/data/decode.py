"""Members of a sample to the values of its fields: one pure function per kind of field.

Nothing here unpickles, runs a program or touches a file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm.data import jpeg, raster
from ldm.data.kinds import OtherKind
from ldm.data.stacking import Slot
from ldm.data.view import View
from ldm.types import ImageKind


class BadSample(ValueError):
    """A sample that cannot be used. The message names shard, key, member and reason.

    Args:
        message: What is wrong with it.
        reason: The same in two words, by which bad samples are counted.
    """

    def __init__(self, message: str, reason: str = "other") -> None:
        super().__init__(message)
        self.reason = reason


class Skipped(NamedTuple):
    """Reason and message of a ``BadSample``."""

    reason: str
    message: str


@dataclass(frozen=True)
class SampleId:
    """Shard and key of a sample, for messages."""

    shard: str
    key: str

    def bad(self, member: str, text: str, reason: str) -> BadSample:
        """Make the error for one member of this sample: what is wrong, and the same in two words."""
        return BadSample(f"{self.shard}: sample '{self.key}', member '{member}': {text}", reason)


NO_IMAGE = View(0, 0)
"""View of a sample of which no image is read."""


@dataclass(frozen=True)
class Members:
    """The members of a sample that one field is decoded from.

    Args:
        content: Member name ("jpg", "txt", ...) to its bytes, the preferred member first.
        sample: Shard and key.
        view: What of the image is shown, and which caption is drawn.
        slot: Memory that the value may take in a batch.
    """

    content: Mapping[str, bytes]
    sample: SampleId
    view: View = NO_IMAGE
    slot: Slot | None = None

    def bad(self, member: str, text: str, reason: str) -> BadSample:
        """Make the error for one member, see ``SampleId.bad``."""
        return self.sample.bad(member, text, reason)

    def json(self) -> dict[str, Any]:
        """Parse the json member; empty without one."""
        if "json" not in self.content:
            return {}
        try:
            meta = json.loads(self.content["json"])
        except (ValueError, RecursionError) as error:
            raise self.bad("json", f"is not JSON ({error})", "malformed json") from error
        if not isinstance(meta, dict):
            raise self.bad("json", f"is a {type(meta).__name__}, expected an object", "malformed json")
        return meta


class Decoded(NamedTuple):
    """Value of a field, and height and width of the image that it was cropped from, where it has one."""

    value: Any
    size: tuple[int, int] | None = None


Decode = Callable[[Members], Decoded | None]
"""Decodes a field; None if no member gives it. Raises BadSample."""


def pixels(read: Callable[[bytes], Tensor], mode: str = "bicubic", resize: bool = True) -> Decode:
    """Make the function that decodes an image and takes what the view shows of it, (C, H, W).

    Args:
        read: Decodes the bytes to (C, h, w) uint8, see ``ldm.data.raster``.
        mode: How it is resized, see ``raster.shown``.
        resize: Whether it is resized to the view; otherwise the crop keeps its size.
    """

    def decode(members: Members) -> Decoded:
        name, content = next(iter(members.content.items()))
        if resize and members.slot is not None and (size := _quick(content, members)):
            return Decoded(members.slot.later(_filling(members.slot, content, members.view, size)), size)
        try:
            image = read(content)
        except OtherKind as error:
            raise members.bad(name, str(error), "other kind of image") from error
        except ValueError as error:
            raise members.bad(name, str(error), "unreadable image") from error
        return Decoded(raster.shown(image, members.view, mode, resize), (image.shape[1], image.shape[2]))

    return decode


def images(read: Callable[[bytes, ImageKind], Tensor], resize: bool = True) -> Decode:
    """Make the function that decodes an image of the kind that the view says, see ``pixels``."""
    return lambda members: pixels(lambda content: read(content, members.view.kind), resize=resize)(members)


def _quick(content: bytes, members: Members) -> tuple[int, int] | None:
    """Return height and width of a JPEG that ``jpeg`` decodes, where the slot takes what is shown of it."""
    view, slot = members.view, members.slot
    return raster.plain_jpeg_size(content) if slot and slot.takes(view.height, view.width, 3) else None


def _filling(slot: Slot, content: bytes, view: View, size: tuple[int, int]) -> Callable[[], object]:
    """Make what decodes such a JPEG into its slot."""
    if size == (view.height, view.width) and not view.flip:
        return partial(jpeg.decode_into, slot.pixels, content)
    return lambda: slot.value.copy_(raster.shown(jpeg.pixels(content), view))


def label_map(members: Members) -> Decoded:
    """Decode the class of every pixel: (H, W) uint8."""
    found, size = _classes(members)  # type: ignore[misc]
    return Decoded(found[0], size)


_classes = pixels(raster.classes, "nearest-exact")


def text(members: Members) -> Decoded | None:
    """Decode a caption."""
    view = members.view
    meta = members.json() if view.draw is not None or "txt" not in members.content else {}
    if (key := next((k for k in view.captions if _has_caption(k, members, meta)), None)) is not None:
        return _txt(members) if key == "txt" else _of_key(key, members, meta)
    if (captions := meta.get("captions")) is not None:
        return _drawn(captions, "captions", members)
    if "txt" in members.content:
        return _txt(members)
    return _caption(meta["caption"], "json", members) if "caption" in meta else None


def _has_caption(key: str, members: Members, meta: Mapping[str, Any]) -> bool:
    return "txt" in members.content if key == "txt" else meta.get(key) is not None


def _of_key(key: str, members: Members, meta: Mapping[str, Any]) -> Decoded:
    """Decode a caption, or one of several, under a key of json."""
    found = meta[key]
    return _caption(found, "json", members) if isinstance(found, str) else _drawn(found, key, members)


def _txt(members: Members) -> Decoded:
    try:
        return _caption(members.content["txt"].decode("utf-8-sig"), "txt", members)
    except UnicodeDecodeError as error:
        what = f"is not UTF-8 ({error.reason} at byte {error.start})"
        raise members.bad("txt", what, "malformed caption") from error


def _drawn(captions: Any, key: str, members: Members) -> Decoded:
    """Decode one of several captions: a list of strings."""
    if not isinstance(captions, list) or not captions or not all(isinstance(c, str) for c in captions):
        what = f"'{key}' is {captions!r:.60}, expected a list of strings"
        raise members.bad("json", what, "malformed caption")
    return _caption(captions[(members.view.draw or 0) % len(captions)], "json", members)


def _caption(caption: Any, member: str, members: Members) -> Decoded:
    if not isinstance(caption, str):
        what = f"the caption is {caption!r:.60}, expected a string"
        raise members.bad(member, what, "malformed caption")
    if not caption.strip():
        raise members.bad(member, "the caption is empty", "empty caption")
    try:
        caption.encode()
    except UnicodeEncodeError as error:
        what = "the caption holds half a character (a lone surrogate)"
        raise members.bad(member, what, "malformed caption") from error
    return Decoded(caption.strip())


def label(members: Members) -> Decoded | None:
    """Decode a class, an integer >= 0."""
    found: Any
    if "cls" in members.content:
        name, value = "cls", members.content["cls"].decode("utf-8-sig", "replace").strip()
        found = int(value) if value.isascii() and value.isdigit() and len(value) < 20 else value
    elif "label" in (meta := members.json()):
        name, found = "json", meta["label"]
    else:
        return None
    if not _is_class(found):
        what = f"the label is {found!r:.60}, expected an integer >= 0, below 2^63"
        raise members.bad(name, what, "malformed label")
    return Decoded(found)


def layout(members: Members) -> Decoded | None:
    """Decode the boxes that lie on what is shown of the image: (n, 5) float32."""
    meta = members.json()
    if "layout" not in meta:
        return None
    height, width = meta.get("height", UNKNOWN_SIZE[0]), meta.get("width", UNKNOWN_SIZE[1])
    try:
        rows = [(_class(item["label"]), *_box(item["box"])) for item in meta["layout"]]
        boxes = torch.tensor(rows, dtype=torch.float32).reshape(-1, 5)
        return Decoded(_shown(boxes, members.view, int(height), int(width)), (int(height), int(width)))
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        expected = 'expected a list of {"label": 3, "box": [left, top, right, bottom]}, fractions in [0, 1]'
        what = f"'layout' is {meta['layout']!r:.80} ({error!r:.60}), {expected}"
        raise members.bad("json", what, "malformed layout") from error


UNKNOWN_SIZE = (1, 1)
"""Height and width of an image whose layout does not state them."""


def _shown(boxes: Tensor, view: View, height: int, width: int) -> Tensor:
    """Move boxes from the image to what is shown of it; those that lie outside are left out."""
    corners = boxes[:, 1:]
    if not ((corners > -1e-3) & (corners < 1.001)).all() or not (corners[:, :2] < corners[:, 2:]).all():
        raise ValueError("a box is empty or outside")
    if height < 1 or width < 1:
        raise ValueError(f"the image is {width}x{height}")
    top, left, high, wide = view.box(height, width)
    sides = torch.tensor([wide, high, wide, high])
    moved = corners * (torch.tensor([width, height, width, height]) / sides)
    moved = (moved - torch.tensor([left, top, left, top]) / sides).clamp(0.0, 1.0)
    if view.flip:
        moved = torch.stack([1 - moved[:, 2], moved[:, 1], 1 - moved[:, 0], moved[:, 3]], dim=1)
    boxes = torch.cat([boxes[:, :1], moved], dim=1)
    return boxes[(boxes[:, 1:3] < boxes[:, 3:]).all(1)]


def _box(box: Any) -> tuple[float, float, float, float]:
    left, top, right, bottom = map(float, box)
    return left, top, right, bottom


def _class(found: Any) -> int:
    if not _is_class(found):
        raise ValueError(f"the label is {found!r:.20}")
    return int(found)


def _is_class(found: Any) -> bool:
    return isinstance(found, int) and not isinstance(found, bool) and 0 <= found < 2**63


def captions(members: Members) -> list[str]:
    """List the canonical caption, and then those that training draws among, if they are others.

    Raises:
        BadSample: If there is none, or one cannot be used.
    """
    found = members.json().get("captions", ())
    views = [replace(members.view, draw=draw) for draw in (None, *range(len(found)))]
    decoded = [text(replace(members, view=view)) for view in views]
    texts = [each.value for each in decoded if each is not None]
    if not texts:
        raise members.bad("txt or json", "missing: it gives the field 'text'", "missing text")
    return texts[:1] if texts[1:] in ([], texts[:1]) else texts

"""Bytes to samples: a pure function of the members of a sample, by a whitelist of member names.

Nothing here unpickles, runs a program or touches a file: a member that the whitelist lacks is not read.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

Field = Literal["image", "text", "label", "latent"]
"""What a sample can carry beside its key."""
FIELDS: tuple[Field, ...] = ("image", "text", "label", "latent")

IMAGES = ("jpg", "jpeg", "png", "webp")
LATENT = "latent.npy"
MEMBERS: dict[str, tuple[str, ...]] = {
    "image": IMAGES,
    "text": ("txt", "json"),
    "label": ("cls", "json"),
    "latent": (LATENT,),
}
"""Members that a field is read from."""
EXTENSIONS = (*IMAGES, "txt", "json", "cls", LATENT)
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
        fields: Any of image, text, label, latent. A picture is decoded only if "image" is among them.
        image_size: Side S of the picture in pixels.
        draw: A random number of 63 bits that chooses among several captions (training), or None to take
            the canonical caption (evaluation).

    Raises:
        BadSample: If a field is missing or cannot be decoded, or a caption is empty.
    """
    sample: Sample = {"key": origin.key}
    for field in fields:
        if field == "image":
            sample["image"] = _image(members, origin, image_size)
        elif field == "text":
            sample["text"] = _text(members, origin, draw)
        elif field == "label":
            sample["label"] = _label(members, origin)
        else:
            sample["latent"] = _latent(members, origin)
    return sample


def json_fields(members: Mapping[str, bytes], origin: Origin) -> set[str]:
    """Return which of text and label the json member of a sample gives."""
    meta = _json(members, origin)
    found = {"text"} if "caption" in meta or "captions" in meta else set()
    return found | ({"label"} if "label" in meta else set())


def _image(members: Mapping[str, bytes], origin: Origin, image_size: int) -> Tensor:
    name = next((name for name in IMAGES if name in members), None)
    if name is None:
        raise _missing("image", members, origin)
    try:
        with Image.open(io.BytesIO(members[name]), formats=("JPEG", "PNG", "WEBP")) as picture:
            pixels = _rgb(picture)
    except UnidentifiedImageError as error:
        raise origin.bad(name, f"its {len(members[name])} bytes are no JPEG, PNG or WebP picture") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error).replace("\n", " ")
        raise origin.bad(name, f"cannot be decoded as a picture ({reason})") from error
    return _square(torch.from_numpy(pixels).permute(2, 0, 1), image_size)


def _rgb(picture: Image.Image) -> np.ndarray:
    """Return (H, W, 3) uint8: upright, alpha over white, 16-bit grey scaled to 8 bits."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I;16"):
        grey = (np.asarray(picture).astype(np.uint32) + 128) // 257
        return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)
    if picture.mode in ("I", "F"):
        raise ValueError(f"pixel mode {picture.mode} is not supported, expected 8 or 16 bits per channel")
    if picture.has_transparency_data:
        canvas = Image.new("RGBA", picture.size, "white")
        canvas.alpha_composite(picture.convert("RGBA"))
        picture = canvas
    return np.array(picture if picture.mode == "RGB" else picture.convert("RGB"))


def _square(image: Tensor, size: int) -> Tensor:
    """Crop the central square of (3, H, W) uint8 and resize it to (3, size, size) where it differs."""
    height, width = image.shape[1:]
    if (height, width) == (size, size):
        return image.contiguous()
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    image = image[None, :, top : top + side, left : left + side]
    if side != size:
        # on uint8 with channels last this path of torch is several times faster than Pillow's
        image = F.interpolate(image, (size, size), mode="bicubic", antialias=True)
    return image[0].contiguous()


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

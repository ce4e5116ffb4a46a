"""Arrays that ``ldm.encode`` stored, to the values of their fields."""

from __future__ import annotations

import io

import numpy as np
import torch
from torch import Tensor

from ldm.data.decode import Decoded, Members
from ldm.io.arrays import parsed


def text_embedding(members: Members) -> Decoded:
    """Decode the tokens of the caption that is drawn: (n, D), as they are stored, see ``captions``."""
    name, content = next(iter(members.content.items()))
    found = _array(name, content, members, "text embedding")
    if found.ndim != 3 or not found.numel():
        what = f"is of shape {tuple(found.shape)}, expected (captions, n, D)"
        raise members.bad(name, what, "unreadable text embedding")
    draw, others = members.view.draw, len(found) - 1
    tokens = found[0 if draw is None or not others else 1 + draw % others]
    tokens = tokens[~tokens.isnan().all(1)]  # what fills up shorter captions
    if not len(tokens) or not tokens.isfinite().all():
        raise members.bad(name, "holds values that are not finite", "unreadable text embedding")
    return Decoded(tokens)


def latent(members: Members) -> Decoded:
    """Decode mean and standard deviation of q(z | image): (2C, h, w), as they are stored."""
    name, content = next(iter(members.content.items()))
    found = _array(name, content, members, "latent")
    if found.ndim != 3 or found.shape[0] % 2:
        what = f"is of shape {tuple(found.shape)}, expected (2C, h, w)"
        raise members.bad(name, what, "unreadable latent")
    if not torch.isfinite(found).all():
        raise members.bad(name, "holds values that are not finite", "unreadable latent")
    return Decoded(found)


def _array(name: str, content: bytes, members: Members, what: str) -> Tensor:
    """Read a numpy array; float16 on the way to the device: half of the bytes."""
    try:
        array = parsed(lambda: np.load(io.BytesIO(content), allow_pickle=False))
    except Exception as error:  # whatever a header may claim
        text = f"cannot be read as a numpy array ({error!s:.150})"
        raise members.bad(name, text, f"unreadable {what}") from error
    if array.dtype not in (np.float16, np.float32):
        raise members.bad(name, f"is {array.dtype}, expected float16 or float32", f"unreadable {what}")
    return torch.from_numpy(array)

"""Channels of the networks of a run: those that ``data.image`` declares."""

from __future__ import annotations

from typing import Any

from jsonargparse import Namespace

_NAME = "image_channels"


def link_channels(config: Namespace) -> None:
    """Give every network of ``model`` that says ``image_channels: null`` the channels of ``data.image``.

    Data of another class than ``Shards`` declare none: then networks decide.
    """
    data = config.data
    if "class_path" in data:
        return
    image = data.get("image")
    _fill(config.model, 3 if image is None else image.channels)


def _fill(part: Any, channels: int) -> None:
    if isinstance(part, Namespace):
        part = vars(part)
    if isinstance(part, dict):
        if _NAME in part and part[_NAME] is None:
            part[_NAME] = channels
        for value in part.values():
            _fill(value, channels)
    elif isinstance(part, list):
        for value in part:
            _fill(value, channels)

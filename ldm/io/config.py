"""Express objects as ``{"class_path": ..., "init_args": {...}}``, as configurations and checkpoints do."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Self

from typing_extensions import override

from ldm import class_path


class Configurable:
    """Keeps its constructor arguments for ``config_of``; subclasses need no code for it."""

    @override
    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        self = super().__new__(cls)
        object.__setattr__(self, "_arguments", (args, kwargs))  # a module would register its modules
        return self


def config_of(value: Any, name: str = "model") -> Any:
    """Express an object by its class and arguments; plain values stay.

    Args:
        value: A ``Configurable``; a class, or a ``functools.partial`` of one; plain values, lists, dicts.
        name: What messages call it.

    Raises:
        ValueError: If it is a function, or an object whose class does not keep its arguments or cannot be
            imported by its name.
    """
    if isinstance(value, bool | int | float | str | None):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {key: config_of(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [config_of(item, f"{name}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Configurable):
        args, kwargs = value._arguments  # type: ignore[attr-defined]
        return _class_config(type(value), args, kwargs, name)
    if isinstance(value, partial) and isinstance(value.func, type):
        return _class_config(value.func, value.args, value.keywords, name)
    if isinstance(value, type):
        return _class_config(value, (), {}, name)
    raise ValueError(
        f"{name}: a checkpoint cannot hold a {type(value).__name__}, expected an object of ldm, a class, a "
        "functools.partial of a class, or plain values"
    )


def _class_config(cls: type, args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str) -> dict[str, Any]:
    if cls.__module__ == "__main__" or "<locals>" in cls.__qualname__:
        raise ValueError(f"{name}: a checkpoint cannot name {cls.__qualname__}: move the class into a module")
    init: Callable[..., None] = cls.__init__  # type: ignore[misc]
    _, *given = inspect.signature(init).bind_partial(None, *args, **kwargs).arguments.items()
    init_args = {key: config_of(value, f"{name}.{key}") for key, value in given}
    return {"class_path": class_path(cls), "init_args": init_args}

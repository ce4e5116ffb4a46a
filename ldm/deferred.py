"""Packages of others that are executed once something needs more of them than each start of a run does.

torchmetrics imports SciPy, torchvision, and where they are installed transformers and matplotlib, for metrics
and plots of which a run may have none: https://github.com/Lightning-AI/torchmetrics/issues/3457. Lightning
needs two of its classes. W&B's start imports its launcher, to ask whether there are inputs for a job of it.

Such a package is found and put into ``sys.modules`` as always, and its modules are imported as always; only
its ``__init__`` waits until a name is looked up in it that it was not given before. Checked on torchmetrics
1.9.0 and wandb 0.31.0.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from threading import RLock
from types import ModuleType
from typing import Any, cast

_EXECUTES = RLock()
"""Held while one is executed: other threads wait, and find all its names."""


class Deferred(ModuleType):
    """A package that is found, but not executed."""

    def __getattr__(self, name: str) -> Any:
        """Look up a name that it was not given before: execute it."""
        if name == "__path__":  # asked for by each import from it; a package has one, a module none
            raise AttributeError(name)
        if not execute(self):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(self, name)

    def __dir__(self) -> Iterable[str]:
        """List the names of the package, executed."""
        execute(self)
        return ModuleType.__dir__(self)


def execute(package: ModuleType) -> bool:
    """Execute a deferred package; if that fails, it stays deferred and the error is raised.

    Returns:
        Whether it is executed; not yet, while it executes itself in this thread.
    """
    with _EXECUTES:
        spec = package.__spec__
        if spec is None or not getattr(spec.loader, "defers", False):
            return True
        loader = cast(_Deferring, spec.loader)
        if loader.executes:
            return False
        loader.executes = True
        try:
            loader.real.exec_module(package)
        finally:
            loader.executes = False
        spec.loader = package.__loader__ = loader.real
        package.__class__ = ModuleType
        return True


def _torchmetrics(package: ModuleType) -> None:
    names = {"__version__": "__about__", "Metric": "metric", "MetricCollection": "collections"}
    vars(package)["_logger"] = logging.getLogger("torchmetrics")  # its modules import it
    import_module("torchmetrics.utilities")  # before those of the names: the reverse order is circular
    for name, module in names.items():
        vars(package)[name] = getattr(import_module(f"torchmetrics.{module}"), name)


def _plot(module: ModuleType) -> None:
    def plot(*args: Any, **kwargs: Any) -> Any:
        execute(module)
        return vars(module)["plot_single_or_multi_val"](*args, **kwargs)

    vars(module).update(_AX_TYPE=Any, _PLOT_OUT_TYPE=Any, plot_single_or_multi_val=plot)


DEFERRED = {
    "torchmetrics": _torchmetrics,
    "torchmetrics.utilities.plot": _plot,
    "wandb.sdk.launch": lambda module: None,
}
"""Packages and modules, each with what gives it the names that need no execution."""


class _Deferring(Loader):
    defers = True  # known by it, not by its class, which a reload of this module makes anew

    def __init__(self, real: Loader) -> None:
        self.real = real
        self.executes = False

    def __getattr__(self, name: str) -> Any:
        """Read the package's files and sources as its own loader does."""
        if name == "real":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self.real, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__class__ = Deferred
        DEFERRED[module.__name__](module)


class _Finder(MetaPathFinder):
    defers = True

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find a package of the table where Python would; any other is for who comes next."""
        spec = PathFinder.find_spec(fullname, path) if fullname in DEFERRED else None
        if spec is not None and spec.loader is not None:
            spec.loader = _Deferring(spec.loader)
        return spec


def defer() -> None:
    """Have the packages of the table wait, if they are not imported yet."""
    if not any(getattr(finder, "defers", False) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())

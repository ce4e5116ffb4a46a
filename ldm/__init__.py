"""Train your own Stable Diffusion from scratch: autoencoder, CLIP and latent diffusion on tar shards."""

from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

from ldm.deferred import defer

__version__ = "0.2.0"

_ROOMS = "callbacks checkpointing conditioners data diffusion diffusion.samplers latents losses metrics"
ROOMS = tuple(f"ldm.{room}" for room in f"{_ROOMS} metrics.extractors nets optim sampling stages".split())
"""Packages whose classes a configuration names without their package."""

defer()  # before anything of ldm imports Lightning


def exports(package: str, **modules: str) -> tuple[Callable[[str], Any], list[str]]:
    """Make ``__getattr__`` and ``__all__`` of a package whose classes are imported on first use.

    The names are the class paths of configurations and checkpoints: ``ldm.conditioners.CLIPText`` stays when
    its file moves.

    Args:
        package: The package's ``__name__``.
        modules: Names of its modules, each with the classes that the package re-exports, separated by spaces.
    """
    homes = {name: f"{package}.{module}" for module, names in modules.items() for name in names.split()}

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        return getattr(import_module(homes[name]), name)

    return get, sorted(homes)


def class_path(cls: type) -> str:
    """Return the import path that checkpoints name a class by: its package, where that re-exports it."""
    package = cls.__module__.rpartition(".")[0]
    exported = package and getattr(import_module(package), cls.__qualname__, None) is cls
    return f"{package if exported else cls.__module__}.{cls.__qualname__}"


def import_exports(packages: Iterable[str]) -> None:
    """Import all classes that packages re-export, so that a configuration can name them without a package."""
    for package in packages:
        module = import_module(package)
        for name in module.__all__:
            getattr(module, name)

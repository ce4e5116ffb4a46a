"""A run in W&B from its begin to its end, whatever ends it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger

from ldm.checkpointing.preemption import EXIT_CODE, Preempted
from ldm.io.artifacts import Reference
from ldm.io.pins import references
from ldm.loggers.client import AT_SIGNAL
from ldm.loggers.wandb import WandbSamplesLogger
from ldm.runs.environment import environment
from ldm.runs.settings import flat, relative


@contextmanager
def tracking(
    loggers: Iterable[Logger], config: Mapping[str, Any], seconds: float, hurries: Callable[[], bool]
) -> Iterator[None]:
    """Begin the runs of W&B, and end them when the ``with`` block ends: done, failed or to be resumed.

    Args:
        loggers: Of the first process; those of others are left alone.
        config: Resolved configuration of the run.
        seconds: How long the end waits at most until everything is sent.
        hurries: Whether a signal came.
    """
    ours = [logger for logger in loggers if isinstance(logger, WandbLogger)]
    code = 1
    try:
        for logger in ours:
            start_wandb(logger, config)
        yield
        code = 0
    except Preempted:
        code, seconds = EXIT_CODE, min(seconds, AT_SIGNAL)
        raise
    finally:
        end_wandb(ours, code, seconds, hurries)


def start_wandb(logger: WandbLogger, config: Mapping[str, Any]) -> None:
    """Open the W&B run, and record configuration and environment in it by flat names.

    Raises:
        ValueError: If it cannot start, e.g. online without a key.
    """
    here = {name: value for name, value in environment().items() if name != "packages"}
    record_config(logger, config, here)
    if isinstance(logger, WandbSamplesLogger):
        use_references(logger, config)


def record_config(logger: WandbLogger, config: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Record a configuration and an environment in a W&B run by flat names, without absolute paths.

    Args:
        logger: Of the run.
        config: Resolved configuration.
        here: Environment.
    """
    settings = {name: relative(value) for name, value in flat({**config, "environment": here}) if name}
    logger.experiment.config.update(settings, allow_val_change=True)


def use_references(logger: WandbSamplesLogger, config: Mapping[str, Any]) -> None:
    """Record the artifacts of W&B that a configuration names as used."""
    named = [Reference.parse(text) for text in references(config)]
    if named:
        logger.use({reference.path: reference.version for reference in named}, "used")


def end_wandb(
    loggers: Sequence[WandbLogger], code: int, seconds: float, hurries: Callable[[], bool] = lambda: False
) -> None:
    """End runs of W&B, see ``WandbSamplesLogger.end``; Lightning's own logger ends with the process."""
    for logger in loggers:
        if isinstance(logger, WandbSamplesLogger):
            logger.end(code, seconds, hurries)

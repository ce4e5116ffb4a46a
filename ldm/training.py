"""Parse the command line of ``ldm.fit``, build stage, data and trainer from it, and train."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from enum import Enum
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only

from ldm import ROOMS, import_exports
from ldm.callbacks.ema import EMA
from ldm.callbacks.lineage import Lineage
from ldm.callbacks.profile import Profile
from ldm.callbacks.record import Record
from ldm.callbacks.sample_grid import SampleGrid
from ldm.callbacks.watchdog import Watchdog
from ldm.checkpointing.callback import Checkpoints
from ldm.checkpointing.preemption import EXIT_CODE, Notice, Preempted, Preemption, requeue
from ldm.cli import Help, run_command
from ldm.data.module import Shards
from ldm.distributed.ddp import check_strategy, register
from ldm.distributed.launch import follow_slurm, launched
from ldm.hardware import keep_freed_memory
from ldm.io.checkpoint import Checkpoint
from ldm.io.lock import held
from ldm.io.pins import pinned_for
from ldm.io.upstream import keep_upstream, rebuilding, upstream_options
from ldm.loggers.directions import directions
from ldm.runs.finished import Finished, check_steps, check_stopped
from ldm.runs.folder import RunFolder, trial_folder
from ldm.runs.image_channels import link_channels
from ldm.runs.options import CONFIG, HELP, OPTIONS, WandB
from ldm.runs.precision import Precision
from ldm.runs.recipe import CONFIGS, Recipe, names_class
from ldm.runs.settings import check_same
from ldm.runs.tracking import tracking
from ldm.runs.trainer import Trainer, ending, settle
from ldm.runs.weights import frozen_at_random, keep_weights
from ldm.stages.counted import global_batch_size
from ldm.stages.stage import Stage

INTERRUPTED = 130
"""Exit code of a run that was stopped by Ctrl-C: what shells make of SIGINT."""


class FitCLI(LightningCLI):
    """Parses a configuration and builds stage, data and trainer from it."""

    model: Stage
    datamodule: L.LightningDataModule
    checkpoint: Checkpoint | None

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make the parser, whose --config takes configurations that build on others."""
        parser = self.parser_class(**kwargs)
        parser.add_argument("-c", "--config", action=Recipe, help=CONFIG)
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what belongs to the run rather than to stage, data or trainer."""
        for name, option in OPTIONS.items():
            parser.add_argument(f"--{name}", **option)
        parser.add_argument("--wandb", type=WandB, default=WandB(), help="Weights & Biases.")
        parser.add_lightning_class_args(Checkpoints, "checkpoints")
        parser.add_lightning_class_args(Preemption, "preemption")
        parser.add_lightning_class_args(Watchdog, "watchdog")
        parser.add_lightning_class_args(EMA, "ema")
        parser.add_lightning_class_args(SampleGrid, "sample_grid")
        parser.link_arguments("run", "trainer.default_root_dir")

    def __init__(self, *args: Any, scope: ExitStack, **kwargs: Any) -> None:
        self.scope = scope
        super().__init__(*args, **kwargs)

    def before_instantiate_classes(self) -> None:
        """Find out where to start before anything expensive is built, and lock the folder of the run."""
        self.name = self.config.run = trial_folder(self.config.run)
        self.config.trainer.default_root_dir = self.config.run
        if self.config.trainer.fast_dev_run:
            self.config.run = self.scope.enter_context(TemporaryDirectory(prefix="ldm-"))
            self.config.trainer.default_root_dir = self.config.run
        self.run_folder = RunFolder(self.config.run)
        self.config = pinned_for(self.run_folder.folder, self.config)
        link_channels(self.config)
        self._find_start()
        if _is_first():
            self.scope.enter_context(held(self.run_folder.folder, "--run"))
            self._find_start()  # whoever held it until now may have trained
        self._follow_launcher()
        settle(self.config.trainer, is_endless=not self.subclass_mode_data)
        wanted = self.config.trainer
        self.precision = Precision.choose(wanted.precision, str(wanted.accelerator))
        keep_freed_memory(self.precision.device)
        wanted.precision = self.precision.name  # the record of the run has the resolved value

    def instantiate_classes(self) -> None:
        """Build everything; a resumed run finds what it was built on by its hash."""
        resumed = nullcontext() if self.checkpoint is None else rebuilding(self.checkpoint)
        with upstream_options(self.config.upstream), resumed:
            super().instantiate_classes()
            if _is_first():
                keep_upstream(self.run_folder.folder, self.model.upstream())
        if self.checkpoint is not None:
            with self._finished_as_configured():
                check_stopped(self.name, self.checkpoint.file, self.checkpoint.state, self.trainer)
        self.checkpoint = None  # keeps a file on the disk that training will replace

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Build the trainer with the run's own loggers, unless the configuration names others."""
        self.config_text = self.parser.dump(self.config, skip_unset=False, skip_link_targets=False)
        self.model.config = yaml.safe_load(self.config_text)["model"]
        logger = self.config_init.trainer.logger
        if logger is None or logger is True:
            wandb, name = self.config_init.wandb, self.model.name
            logger = self.run_folder.loggers(wandb, name, lambda: directions(self.trainer))
        if self.start is None and self.config.weights is not None:
            self.model.init_from(Checkpoint.open(self.config.weights, self.model.name).state)
        try:
            trainer = super().instantiate_trainer(logger=logger, **kwargs)
        except RuntimeError as error:
            if "more than one stateful callback" not in str(error):
                raise
            raise ValueError(
                "trainer.callbacks: got two of the same kind and name: give each Evaluation a name of its own"
            ) from error
        if self.config.profile:
            trainer.callbacks.append(Profile(self.config.profile))  # type: ignore[attr-defined]
        if self.config_init.wandb.artifacts:
            weights = self.config.weights if self.start is None else None
            trainer.callbacks.append(Lineage(self.run_folder, weights))  # type: ignore[attr-defined]
        return trainer

    def _find_start(self) -> None:
        self.start = self.run_folder.start_from(self.config.ckpt_path)
        self.checkpoint = None if self.start is None else Checkpoint.open(self.start)
        if self.checkpoint is not None:
            _warn(keep_weights(self.config, self.start))
            wanted = self.config.trainer
            with self._finished_as_configured():
                check_steps(self.name, self.checkpoint, wanted.max_steps, wanted.limit_val_batches != 0)

    @contextmanager
    def _finished_as_configured(self) -> Iterator[None]:
        """A finished run that is called with other settings is an error."""
        try:
            yield
        except Finished as reason:
            now = yaml.safe_load(self.parser.dump(self.config, skip_unset=False, skip_link_targets=False))
            check_same(reason, now, self.run_folder.folder / "config.yaml")
            raise

    def _follow_launcher(self) -> None:
        """Train on the processes that torchrun started: with fewer, each would train a model of its own."""
        follow_slurm()
        nodes, here = launched() or (None, None)
        for name, default, count in (("num_nodes", 1, nodes), ("devices", "auto", here)):
            got = self.config.trainer[name]
            if count is not None and str(got) not in (str(default), str(count)):
                raise ValueError(f"trainer.{name}: got {got}, but torchrun started {count}: leave it out")
            self.config.trainer[name] = count or got


def build(arguments: Sequence[str] | None = None, scope: ExitStack | None = None) -> FitCLI:
    """Parse a command line, and build stage, data and trainer from it.

    Args:
        arguments: The command line; None takes that of the process.
        scope: Closed when training has ended, which unlocks the folder of the run; None: with the process.
    """
    _quieten()
    # jsonargparse cannot write the defaults of some of Lightning's callbacks, e.g. Timer
    yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, value: dumper.represent_data(value.value))
    import_exports(ROOMS)
    register()
    is_other = names_class("data", sys.argv[1:] if arguments is None else arguments)
    return FitCLI(
        Stage,
        L.LightningDataModule if is_other else Shards,
        scope=scope or ExitStack(),
        trainer_class=Trainer,
        save_config_callback=Record,
        save_config_kwargs={"save_to_log_dir": False},
        seed_everything_default=0,
        parser_kwargs={
            "default_config_files": [str(CONFIGS / "base.yaml")],
            "description": HELP,
            "formatter_class": Help,
            "exit_on_error": False,
            "allow_abbrev": False,  # or a misspelt option passes for another
        },
        subclass_mode_model=True,
        subclass_mode_data=is_other,
        run=False,
        args=None if arguments is None else list(arguments),
        auto_configure_optimizers=False,
    )


def fit(arguments: Sequence[str] | None = None, notice: Notice | None = None) -> None:
    """Train by a command line, see ``build``.

    Args:
        arguments: The command line; None takes that of the process.
        notice: Remembers signals that came before training; None has not listened so far.

    Raises:
        Preempted: If a signal stopped the run.
    """
    with ExitStack() as scope:
        _fit(build(arguments, scope), notice)


def _fit(cli: FitCLI, notice: Notice | None) -> None:
    notice = notice or Notice()
    for callback in cli.trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Preemption):
            callback.notice = notice
    check_strategy(cli.trainer)
    is_first = cli.trainer.is_global_zero
    loggers = cli.trainer.loggers if is_first else []
    seconds = cli.config_init.wandb.finish_timeout
    with tracking(loggers, yaml.safe_load(cli.config_text), seconds, lambda: notice.urgency > 0):
        if is_first:
            print(_beginning(cli), flush=True)
            _warn(cli.precision.warning())
            if cli.start is None:
                _warn(frozen_at_random(cli.config))
        cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.start)
        if is_first:
            dry = "dry run, nothing is left, " if cli.config.trainer.fast_dev_run else ""
            print(f"{cli.name}: {dry}{ending(cli.trainer, cli.model.progress)}", flush=True)


def _beginning(cli: FitCLI) -> str:
    """Print the start of a run in one line."""
    size = sum(p.numel() for p in cli.model.parameters() if p.requires_grad)
    start = f"resumes {cli.start}" if cli.start else f"starts with {cli.config.weights or 'random weights'}"
    samples, lr = "", cli.model.optimizer.lr
    if hasattr(cli.datamodule, "batch_size"):
        batch = global_batch_size(cli.trainer, cli.datamodule)
        samples, lr = f"{batch} samples per step, ", lr * cli.model.optimizer.scaling.factor(batch)
    return (
        f"{cli.name}: {start}; {cli.model.name}, {size:,} parameters to train, "
        f"{samples}learning rate {lr:.3g}, {cli.precision}"
    )


def _quieten() -> None:
    """Drop Lightning's messages for its own users: tips, hardware, and doubts about our choices."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    doubts = ".*args parameter is intended.*", ".*does not have many workers.*", ".*LeafSpec.*", ".*`srun`.*"
    for message in doubts:
        warnings.filterwarnings("ignore", message)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0 done, 2 bad input, 75 stopped by a signal, 130 by Ctrl-C."""
    notice = Notice()
    try:
        with notice.listening():
            return run_command(lambda: fit(arguments, notice))
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit as end:  # Lightning's, after a KeyboardInterrupt in training
        return INTERRUPTED if isinstance(end.__context__, KeyboardInterrupt) else int(end.code or 0)
    except Finished as reason:
        print(reason)
        return 0
    except Preempted as reason:
        return _stop(reason)


def _is_first() -> bool:
    """Whether this is rank 0, by the variables of its launcher."""
    return getattr(rank_zero_only, "rank", 0) == 0


def _warn(warning: str | None) -> None:
    if warning is not None and _is_first():
        print(warning, file=sys.stderr, flush=True)


def _stop(reason: Preempted) -> int:
    """Report the stop and requeue, on the first process; the others end without an error."""
    if not _is_first():
        return 0
    print(reason, flush=True)
    requeue(reason.by)
    return EXIT_CODE

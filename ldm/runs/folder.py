"""Folder of a run: resolved configuration, environment, checkpoints, metrics, images and W&B files."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from ldm.checkpointing.writer import newest_complete
from ldm.io import checkpoint as ckpt
from ldm.io.atomic import write_text
from ldm.loggers.directions import Directions, no_directions
from ldm.loggers.metrics_csv import MetricsCSV
from ldm.loggers.wandb import WandbSamplesLogger
from ldm.runs.environment import environment, uncommitted
from ldm.runs.options import WandB

WANDB_ID = "wandb-id.txt"


class RunFolder:
    """Folder of one run."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    @property
    def last(self) -> Path:
        """The newest checkpoint."""
        return self.folder / "checkpoints" / "last.ckpt"

    def start_from(self, ckpt_path: str | None) -> Path | None:
        """Resolve ``--ckpt_path`` to the file that training continues from, or None to start afresh.

        Raises:
            FileNotFoundError: If a path is given and there is no checkpoint.
            ValueError: If None is given and the folder already has checkpoints, or if all are damaged.
        """
        if ckpt_path == "last":
            return newest_complete(self.last.parent)
        if ckpt_path is not None:
            return ckpt.find(ckpt_path)
        found = sorted((self.folder / "checkpoints").glob("*.ckpt"))
        if found:
            raise ValueError(
                f"ckpt_path: null starts afresh, but run folder '{self.folder}' already has {found[0].name}: "
                "delete the folder, name another with --run, or resume with --ckpt_path last"
            )
        return None

    def loggers(self, wandb: WandB, job_type: str, directions: Directions) -> list[Logger]:
        """Make the loggers: W&B unless disabled, and metrics.csv."""
        loggers: list[Logger] = [MetricsCSV(str(self.folder), directions)]
        if wandb.mode != "disabled":
            loggers.insert(0, self.wandb(wandb, job_type, directions=directions))
        return loggers

    def record(self, config: str) -> None:
        """Write config.yaml, environment.json and uncommitted.diff if there is one.

        Earlier versions are renamed to ``<stem>-<n><suffix>``.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        replace_text(self.folder / "config.yaml", config)
        replace_text(self.folder / "environment.json", json.dumps(environment(), indent=2) + "\n")
        changes, path = uncommitted(), self.folder / "uncommitted.diff"
        if changes or path.exists():
            replace_text(path, changes)

    @property
    def records(self) -> list[Path]:
        """Contents of the last ``record``."""
        names = ("config.yaml", "environment.json", "uncommitted.diff")
        return [self.folder / name for name in names if (self.folder / name).exists()]

    @property
    def curves(self) -> list[Path]:
        """What was measured: its files that are there."""
        names = ("metrics.csv", "metrics.json", "evaluations.jsonl")
        return [self.folder / name for name in names if (self.folder / name).exists()]

    @property
    def chain(self) -> str:
        """Group of the run in W&B: the parent folder."""
        return self.folder.absolute().parent.name

    def wandb(
        self,
        settings: WandB,
        job_type: str,
        chain: str | None = None,
        directions: Directions = no_directions,
    ) -> WandbSamplesLogger:
        """Make the logger to W&B: the same W&B run each time that it is made for this folder.

        Args:
            settings: What W&B gets.
            job_type: Stage, or what else is done.
            chain: Group of the W&B run; None is this folder's.
            directions: Looks up whether the best value of a metric is its smallest or largest.
        """
        # staging and cache belong into the run folder, not into the home folder
        for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_ARTIFACT_DIR"):
            os.environ[name] = str(self.folder.absolute() / "wandb" / "staging")
        os.environ["WANDB_SILENT"] = "true"
        self.folder.mkdir(parents=True, exist_ok=True)
        return WandbSamplesLogger(
            directions,
            {
                "name": self.folder.name,
                "save_dir": str(self.folder),
                "id": self._wandb_id(settings.project),
                "project": settings.project,
                "offline": settings.mode == "offline",
                "entity": settings.entity,
                "tags": settings.tags,
                "group": chain or settings.group or self.chain,
                "job_type": job_type,
                "resume": "allow",
            },
            settings.required,
        )

    def _wandb_id(self, project: str = "") -> str | None:
        """Return the W&B run of this folder; a folder that was moved keeps it, a copy gets its own.

        The file has it, with the inode and the path of the folder that it was made in, and its project.

        Args:
            project: Project that the run is wanted in; "" for any.

        Raises:
            ValueError: If WANDB_RUN_ID, e.g. of a sweep, is another, or if the run is in another project.
        """
        if getattr(rank_zero_only, "rank", 0) != 0:
            return None  # only the first process talks to W&B, so it alone names the run
        path, given = self.folder / WANDB_ID, os.environ.get("WANDB_RUN_ID")
        here = [str(self.folder.stat().st_ino), str(self.folder.resolve())]
        run, *made_in = path.read_text().split("\n")[:4] if path.exists() else [""]
        known = made_in[2] if len(made_in) > 2 else ""
        if run and _is_copy(run, made_in, here):
            print(f"'{self.folder}' is a copy of '{made_in[1]}': it gets a W&B run of its own", flush=True)
            run = ""
        if run and given and given != run:
            raise ValueError(
                f"WANDB_RUN_ID is {given}, but the run of '{path}' is {run}: unset it to go on with that, "
                "or name another folder with --run"
            )
        if run and project and known not in ("", project):
            raise ValueError(
                f"wandb.project: got {project}, but the run of '{path}' is in {known}: name that, or delete "
                "the file for a new run"
            )
        run = run or given or secrets.token_hex(4)
        if made_in != [*here, project or known]:
            write_text(path, "\n".join([run, *here, project or known]) + "\n")
        return run


def trial_folder(run: str) -> str:
    """Return the folder of a run: within the one that is named, by its id, for a trial of a sweep of W&B."""
    trial = os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None
    return str(Path(run, trial)) if trial else run


def _is_copy(run: str, made_in: list[str], here: list[str]) -> bool:
    """Whether a folder is a copy, whose original is still there, rather than moved."""
    if len(made_in) < 2 or made_in[0] == here[0] or made_in[1] == here[1]:
        return False
    original = Path(made_in[1], WANDB_ID)
    return original.exists() and original.read_text().split("\n")[0] == run


def replace_text(path: Path, text: str) -> None:
    """Write a text file atomically; an earlier one that differs stays as ``<stem>-<n><suffix>``."""
    if path.exists() and path.read_text(encoding="utf-8") != text:
        number = 1
        while (earlier := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists():
            number += 1
        path.rename(earlier)
    write_text(path, text)

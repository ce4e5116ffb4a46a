"""The W&B run of a run of ours: its axis, summaries, files and artifacts."""

from __future__ import annotations

import math
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from ldm.io.wandb_client import Unreachable
from ldm.loggers.client import begin, end, image
from ldm.loggers.directions import Directions
from ldm.loggers.logged import PER_STEP, Row, logged, position_of_values
from ldm.loggers.metrics_csv import format_value
from ldm.loggers.outbox import Artifact, Entry, Outbox, described, restored
from ldm.loggers.uploads import images, mark_sent, unsent


class WandbSamplesLogger(WandbLogger):
    """Logs to W&B over samples seen, each row once, and keeps the best value of metrics of known direction.

    Each row has a position (``ldm.loggers.logged``), W&B's ``_step``. A resumed run sends what the server
    lacks from the run's folder first, and not again what the server has.

    Lightning's own logger defines "over steps" for all metrics, and of several patterns that match a name
    W&B takes any, not the same one each time. So there is one pattern here, for all metrics, and a
    definition by name for each metric whose best value is to be kept.

    Args:
        directions: Looks up whether the best value of a metric is its smallest or largest.
        settings: What ``WandbLogger`` takes.
        required: Whether a server that gives no answer is an error; else the run begins offline.
    """

    def __init__(self, directions: Directions, settings: Mapping[str, Any], required: bool = False) -> None:
        super().__init__(**settings)
        self._directions = directions
        self._required = required
        self._defined: set[str] = set()
        self._sent = 0
        self._next: int | None = None
        self._is_lost = False
        self.caught_up: list[Entry] = []
        self._wandb_init.pop("anonymous", None)  # Lightning passes it always, W&B warns of it always
        if self._offline:
            self._wandb_init["mode"] = "offline"

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run, begun on first use.

        Raises:
            ValueError: If W&B refuses it, or if it is required and the server or the disk does not answer.
        """
        if self._experiment is None:
            self._experiment = self._begin()
            self._experiment.define_metric("samples")
            self._experiment.define_metric("*", step_metric="samples")
        return self._experiment

    def _begin(self) -> Any:
        """Begin online or offline as wanted, offline without an answer, or not at all without a disk."""
        try:
            try:
                return begin(self._wandb_init)
            except Unreachable as error:
                if self._required:
                    raise
                warn(f"{error}: the run begins offline; {self.later} sends it once there is an answer")
                return self._begin_as("offline")
        except OSError as error:
            where = f"'{Path(str(self.save_dir)) / 'wandb'}'"
            if self._required:
                raise ValueError(f"wandb.mode: W&B cannot write to {where} ({error.strerror})") from error
            warn(
                f"W&B cannot write to {where} ({error.strerror}): training goes on without it; {self.later} "
                "sends the run once there is room"
            )
            self._is_lost = True
            return self._begin_as("disabled")

    def _begin_as(self, mode: str) -> Any:
        self._offline = True
        self._wandb_init["mode"] = mode
        return begin(self._wandb_init)

    @property
    def later(self) -> str:
        """The command that sends what the server lacks."""
        return f"'python -m ldm.sync {self.save_dir}'"

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log values as metrics.csv has them, new ones after their summaries are defined.

        Args:
            metrics: Values by name.
            step: Optimizer steps done before this one.
        """
        values = {name: float(format_value(value)) for name, value in metrics.items() if name != "epoch"}
        self.log_row(Row(position_of_values(step or 0, values), step or 0, values))

    @rank_zero_only
    def log_row(self, row: Row) -> None:
        """Log a row, unless the server has it; before the first one what it lacks of those before."""
        try:
            self.catch_up(row.position)
            self._send(row)
        except Exception as error:  # its process is gone
            self._lose(error)

    def _lose(self, error: Exception) -> None:
        """Say once that W&B is not to have everything of this begin of the run."""
        if not self._is_lost:
            reason = error.strerror if isinstance(error, OSError) else type(error).__name__
            warn(f"W&B's client failed ({reason}): training goes on; {self.later} sends the rest")
        self._is_lost = True

    def catch_up(self, until: float = math.inf) -> int:
        """Send what the server lacks of the rows in the run's folder, once in a process.

        Args:
            until: Position of the first row that is not sent; by default all are.

        Returns:
            How many were sent; 0 offline.
        """
        if self._next is not None:
            return 0
        self._next = 0 if self._offline else self.experiment.starting_step
        if self._offline:
            return 0
        for begun in unsent(self._client_folder, self.experiment.id):
            if begun.name != self._begun:
                self._save(images(begun), begun / "files")
        self._catch_up_artifacts()
        return sum(self._send(row) for row in logged(Path(str(self.save_dir))) if row.position < until)

    def _catch_up_artifacts(self) -> None:
        """Send what earlier begins of the run noted in the outbox."""
        for entry in self._outbox.entries():
            if entry["begun"] == self._begun:
                continue
            try:
                if "publish" in entry:
                    self._log_artifact(restored(entry["publish"]))
                elif not self._draw(entry["use"], entry["role"]):
                    continue
                self.caught_up.append(entry)
            except (OSError, ValueError) as error:
                warn(f"wandb.artifacts: an artifact of '{self.save_dir}' is not sent: {error}")

    @property
    def _client_folder(self) -> Path:
        return Path(self.experiment.dir).parent.parent

    @property
    def _begun(self) -> str:
        """Name of the client's folder of this begin of the run."""
        return Path(self.experiment.dir).parent.name

    @property
    def _outbox(self) -> Outbox:
        return Outbox(Path(str(self.save_dir)) / "wandb")

    def _note(self, entry: Entry) -> None:
        """Note in the outbox what the server may lack, with what a later begin of the run has to know."""
        known = {
            name: self._wandb_init.get(name) for name in ("project", "entity", "group", "job_type", "tags")
        }
        try:
            self._outbox.add({**entry, "begun": self._begun, "run": known})
        except OSError as error:
            self._lose(error)

    def _save(self, paths: Iterable[Path], base: Path) -> None:
        for path in paths:
            self.experiment.save(str(path), base_path=str(base), policy="now")

    def _send(self, row: Row) -> bool:
        position = max(row.position, self._sent)  # rows of one position become one
        if position < (self._next or 0):
            return False
        self._sent, values = position, dict[str, Any](row.values)
        self._define(values.keys())
        if row.grid is not None:
            values[row.grid.panel] = image(row.grid.path, row.grid.caption)
        self.experiment.log({**values, "trainer/global_step": row.step}, step=position)
        return True

    def _define(self, names: Iterable[str]) -> None:
        if new := set(names) - self._defined:
            self._defined |= new
            # a sweep takes no goal from within a summary, such as val/loss.min
            known = {} if os.environ.get("WANDB_SWEEP_ID") else self._directions()
            for name in sorted(new & known.keys()):
                self.experiment.define_metric(name, step_metric="samples", summary=f"{known[name]},last")

    def end(self, code: int, seconds: float, hurries: Callable[[], bool]) -> bool:
        """End the run of W&B in a given time, and say what was not sent.

        Args:
            code: Exit code of ours.
            seconds: How long to wait at most.
            hurries: Whether a signal came.

        Returns:
            Whether everything was sent; offline, whether it was written.
        """
        if self._experiment is None:
            return not self._is_lost
        run, folder, begun, outbox = self._experiment, self._client_folder, self._begun, self._outbox
        self._experiment = None
        reason = end(run, code, seconds, hurries)
        if reason is not None and not self._is_lost:
            steps = self._sent // PER_STEP + 1
            warn(f"W&B: {reason}: rows up to step {steps} may be missing: {self.later} sends what is")
        is_sent = reason is None and not self._is_lost
        with suppress(OSError):  # then it is sent once more
            if is_sent and not self._offline and outbox.exists:
                stay = [e for e in outbox.entries() if e["begun"] != begun or e.get("failed")]
                outbox.replace(entry for entry in stay if entry not in self.caught_up)
            if is_sent and not self._offline and self._next is not None:
                mark_sent(folder, run.id)
        return is_sent

    @rank_zero_only
    def keep_files(self, paths: Iterable[Path]) -> None:
        """Copy small files into the W&B run: it may be synced from elsewhere, later."""
        try:
            for path in paths:
                copied = Path(self.experiment.dir) / path.name
                shutil.copyfile(path, copied)
                self._save([copied], copied.parent)
        except OSError as error:
            self._lose(error)

    @rank_zero_only
    def use(self, versions: Mapping[str, str], role: str) -> None:
        """List the artifacts that a run uses in its config, and draw lineage from those that W&B knows.

        Offline the client refuses to draw lineage: it is drawn when the run is sent.

        Args:
            versions: Version of each artifact, by its name.
            role: What they are to the run: the key in its config.
        """
        if not self._draw(versions, role):
            self._note({"use": dict(versions), "role": role, "failed": not self._offline})

    def _draw(self, versions: Mapping[str, str], role: str) -> bool:
        """List artifacts and draw lineage; returns whether it could be drawn from all of them."""
        self.experiment.config.update({role: dict(versions)}, allow_val_change=True)
        is_drawn = not (self._offline and versions)
        for name, version in () if self._offline else sorted(versions.items()):
            try:
                self.experiment.use_artifact(f"{name}:{version}")
            except Exception as error:  # no such artifact, or no answer: training matters more
                is_drawn = False
                warnings.warn(f"wandb.artifacts: no lineage from {name}:{version} ({error})", stacklevel=3)
        return is_drawn

    @rank_zero_only
    def publish(self, artifact: Artifact) -> None:
        """Log an artifact; offline it is staged in the run folder until it is sent."""
        copies = self._log_artifact(artifact)
        self._note({"publish": described(artifact, copies)})

    def _log_artifact(self, artifact: Artifact) -> dict[str, str | None]:
        """Log an artifact; returns the client's copy of each of its files."""
        import wandb

        made = wandb.Artifact(artifact.name, artifact.kind, metadata=dict(artifact.metadata))
        for name, path in artifact.files.items():
            made.add_file(str(path), name, policy="mutable")  # copied: a resumed run replaces its checkpoint
        for path in artifact.references:
            made.add_reference(path.absolute().as_uri(), checksum=False)
        copies = {name: made.manifest.entries[name].local_path for name in artifact.files}
        self.experiment.log_artifact(made, aliases=["latest", *artifact.versions])
        return copies


def warn(text: str) -> None:
    """Write one line about W&B to stderr."""
    print(f"warning: {text}", file=sys.stderr, flush=True)

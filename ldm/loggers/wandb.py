"""The W&B run of a run of ours: its axis, summaries, files and artifacts."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from ldm.loggers.directions import Directions


@dataclass(frozen=True)
class Artifact:
    """Files with a name and a version, that W&B draws lineage between.

    Args:
        name: Letters, digits, ``-``, ``_`` and ``.``.
        kind: What W&B calls its type.
        versions: Names of this version: other contents have others.
        files: Files that are uploaded.
        references: Files that are named by their path and size only, such as shards.
        metadata: Metadata of the artifact.
    """

    name: str
    kind: str
    versions: Sequence[str]
    files: Sequence[Path] = ()
    references: Sequence[Path] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)


class WandbSamplesLogger(WandbLogger):
    """Logs to W&B over samples seen, and keeps the best value of each metric whose direction is known.

    Lightning's own logger defines "over steps" for all metrics, and of several patterns that match a name
    W&B takes any, not the same one each time. So there is one pattern here, for all metrics, and a
    definition by name for each metric whose best value is to be kept.

    Args:
        directions: Looks up whether the best value of a metric is its smallest or largest.
        settings: What ``WandbLogger`` takes.
    """

    def __init__(self, directions: Directions, settings: Mapping[str, Any]) -> None:
        super().__init__(**settings)
        self._directions = directions
        self._defined: set[str] = set()
        self._wandb_init.pop("anonymous", None)  # Lightning passes it always, W&B warns of it always
        if self._offline:
            self._wandb_init["mode"] = "offline"

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run, begun on first use."""
        if self._experiment is None:
            import wandb

            self._experiment = wandb.init(**self._wandb_init)
            self._experiment.define_metric("samples")
            self._experiment.define_metric("*", step_metric="samples")
        return self._experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log values, new ones after their summaries are defined.

        Args:
            metrics: Values by name.
            step: Optimizer steps done before this one.
        """
        if new := metrics.keys() - self._defined:
            self._defined |= new
            known = self._directions()
            for name in new & known.keys():
                self.experiment.define_metric(name, step_metric="samples", summary=f"{known[name]},last")
        super().log_metrics(metrics, step)

    @rank_zero_only
    def keep_files(self, paths: Iterable[Path]) -> None:
        """Copy small files into the W&B run: it may be synced from elsewhere, later."""
        for path in paths:
            copied = Path(self.experiment.dir) / path.name
            shutil.copyfile(path, copied)
            self.experiment.save(str(copied), base_path=self.experiment.dir, policy="now")

    @rank_zero_only
    def use(self, versions: Mapping[str, str], role: str) -> None:
        """List the artifacts that a run uses in its config, and draw lineage from those that W&B knows.

        Offline the client refuses to draw lineage, and a later sync does not make up for it.

        Args:
            versions: Version of each artifact, by its name.
            role: What they are to the run: the key in its config.
        """
        self.experiment.config.update({role: dict(versions)}, allow_val_change=True)
        for name, version in () if self._offline else sorted(versions.items()):
            try:
                self.experiment.use_artifact(f"{name}:{version}")
            except Exception as error:  # no such artifact, or no answer: training matters more
                warnings.warn(f"wandb.artifacts: no lineage from {name}:{version} ({error})", stacklevel=2)

    @rank_zero_only
    def publish(self, artifact: Artifact) -> None:
        """Log an artifact; offline it is staged in the run folder until it is synced."""
        import wandb

        made = wandb.Artifact(artifact.name, artifact.kind, metadata=dict(artifact.metadata))
        for path in artifact.files:
            made.add_file(str(path), policy="mutable")  # copied: a resumed run replaces its checkpoint
        for path in artifact.references:
            made.add_reference(path.absolute().as_uri(), checksum=False)
        self.experiment.log_artifact(made, aliases=["latest", *artifact.versions])

"""Options of ``ldm.fit`` that belong to a run; imported without Lightning, so that its help is quick."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from ldm.io.upstream import OPTION

HELP = """Train a stage: autoencoder, CLIP or diffusion.

  python -m ldm.fit --config configs/demo/autoencoder.yaml [--any.field value ...]

The same command resumes an interrupted run; a finished run says so. Everything that a run leaves is in the
folder that --run names. SIGTERM and SIGUSR1 stop it between two steps, saved, with exit code 75; under SLURM
SIGUSR1 also queues the job again."""

CONFIG = (
    "Configuration: a YAML file, or a name such as demo/clip. A later one changes fields of the one before."
)

OPTIONS: dict[str, dict[str, Any]] = {
    "run": {"type": str, "required": True, "help": "Folder of the run, e.g. runs/demo/clip."},
    "ckpt_path": {
        "type": str | None,
        "default": "last",
        "help": "Checkpoint to resume from: last (the run's own, if it has one), a path, or null (none).",
    },
    "weights": {
        "type": str | None,
        "help": "Checkpoint, run folder or wandb:... of this stage: a fresh run starts with its weights.",
    },
    "profile": {
        "type": int,
        "default": 0,
        "help": "Steps of which a trace is written into the run's folder, for chrome://tracing or Perfetto.",
    },
    "upstream": OPTION,
}
"""Arguments of a parser for each option."""

FIELDS = {
    "seed_everything": "seed of all random numbers, 0 unless given",
    "print_config": "show the resolved configuration, and train nothing",
    "checkpoints": "monitor, mode, keep_every_n_steps, keep_newest: checkpoints kept in addition to the last",
    "preemption": "every_n_steps: how often processes exchange signals",
    "watchdog": "timeout: when a run that hangs is ended",
    "ema": "decay, warmup: the moving average of the weights",
    "sample_grid": "num, seed, folder: images of each validation",
    "model": "stage, its networks and optimizer",
    "data": "shards, batch size, image size, or a data module of one's own",
    "trainer": "steps, precision, devices, callbacks",
}
"""Further options of the full parser, in one line each."""


@dataclass
class WandB:
    """Settings of Weights & Biases: one for each of the things that a run sends or waits for.

    Args:
        mode: "offline" writes into the run folder only, "python -m ldm.sync" sends it later; "online" sends
            it while the run goes on, and needs "wandb login" or WANDB_API_KEY; "disabled" writes nothing.
        project: Project that the run belongs to.
        entity: User or team that the project belongs to; None means that of the login.
        tags: Tags of the run.
        artifacts: Whether checkpoints and shards of latents become artifacts of W&B, with lineage to what
            they were built on. Checkpoints are copied, shards are named.
        group: Group of the run; None is the folder that the run's folder lies in.
        required: Whether a server that gives no answer when the run begins ends it, with exit code 75: it may
            be repeated. Otherwise the run begins offline.
        finish_timeout: Seconds that the end of a run waits at most until everything is sent; at SIGTERM and
            SIGUSR1 at most 10.

    Raises:
        ValueError: If ``finish_timeout`` is negative.
    """

    mode: Literal["offline", "online", "disabled"] = "offline"
    project: str = "ldm"
    entity: str | None = None
    tags: list[str] = field(default_factory=list)
    artifacts: bool = False
    group: str | None = None
    required: bool = False
    finish_timeout: float = 60.0

    def __post_init__(self) -> None:
        if not self.finish_timeout >= 0:
            raise ValueError(f"wandb.finish_timeout: got {self.finish_timeout}, expected 0 or more seconds")

"""Command lines of the demo's configurations in miniature."""

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Chain:
    """Where a chain of runs lies; ``upstream`` holds the runs that later stages build on, if elsewhere."""

    runs: Path
    shards: Path
    latents: Path
    upstream: Path | None = None

    def arguments(self, name: str, *more: str) -> list[str]:
        """The command line of ldm.fit for configs/demo/<name>.yaml, eight steps of eight samples."""
        upstream = self.upstream or self.runs
        train = self.latents if name == "diffusion" else self.shards
        settings = {
            "run": self.runs / name,
            "wandb.mode": "disabled",
            "data.train": train / "train-{000000..000002}.tar",
            "data.val": self.shards / "val-000000.tar",
            "data.batch_size": 8,
            "trainer.max_steps": 8,
            "trainer.val_check_interval": 4,
            "trainer.log_every_n_steps": 1,
            "trainer.accelerator": "cpu",
        }
        if name in ("diffusion", "pixels"):
            settings["model.conditioner.checkpoint"] = upstream / "clip"
            settings["model.sampler.num_steps"] = 2
        if name == "diffusion":
            settings["model.latents.checkpoint"] = upstream / "autoencoder"
        options = [f"--{key}={value}" for key, value in settings.items()]
        return ["--config", str(ROOT / "configs" / "demo" / f"{name}.yaml"), *options, *more]

    def encode(self) -> list[str]:
        """The command line of ldm.encode."""
        shards = self.shards / "train-{000000..000002}.tar"
        return [f"--autoencoder={self.runs / 'autoencoder'}", f"--shards={shards}", f"--out={self.latents}"]

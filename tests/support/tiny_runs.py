"""Command lines of the demo's configurations in miniature."""

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Chain:
    """Folders of a chain of runs.

    Tests run in the chain's folder, where the configurations find their upstream runs by their own relative
    paths; ``runs`` of another chain is only the folder of further runs.
    """

    runs: Path
    shards: Path
    latents: Path

    def arguments(self, name: str, *more: str) -> list[str]:
        """The command line of ldm.fit for configs/demo/<name>.yaml, eight steps of eight samples."""
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
            "trainer.precision": "32-true",
            "sample_grid.num": 6,
        }
        if name in ("diffusion", "pixels"):
            settings["model.sampler.num_steps"] = 2
        if name == "diffusion":
            settings["model.denoiser.block_out_channels"] = "[32,64]"
        options = [f"--{key}={value}" for key, value in settings.items()]
        return ["--config", str(ROOT / "configs" / "demo" / f"{name}.yaml"), *options, *more]

    def encode(self) -> list[str]:
        """The command line of ldm.encode."""
        shards = self.shards / "train-{000000..000002}.tar"
        return [f"--autoencoder={self.runs / 'autoencoder'}", f"--shards={shards}", f"--out={self.latents}"]

"""Image grids: the same samples each time, on disk and in W&B."""

import os
import subprocess
import sys

import numpy as np
import pytest
import tiny_stage
import torch
from lightning import LightningModule
from PIL import Image
from tiny_stage import Points, TinyStage, loader, trainer

from ldm.callbacks.sample_grid import SampleGrid
from ldm.io.images import GAP, read_text, to_bytes


def fit(folder, *callbacks, stage=None):
    stage = stage or TinyStage()
    run = trainer(folder, callbacks=list(callbacks))
    run.fit(stage, loader(1000), loader(12))
    return stage


def test_each_validation_draws_the_first_samples_next_to_their_input(tmp_path):
    stage = fit(tmp_path, SampleGrid(num=6))
    assert sorted(os.listdir(tmp_path / "images")) == ["tiny-0000000016.png", "tiny-0000000032.png"]
    path = tmp_path / "images" / "tiny-0000000032.png"
    drawn = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
    assert drawn.shape == (3, 2 * 4 + GAP, 3 * 8 + 2 * GAP)
    points = Points(12)
    for i in range(6):
        top, left = (i // 3) * (4 + GAP), (i % 3) * (8 + GAP)
        original = points[i]["image"]
        assert torch.equal(drawn[:, top : top + 4, left : left + 4], to_bytes(original))
        made = stage.generate({"image": original[None]}, 0)[0]
        assert torch.equal(drawn[:, top : top + 4, left + 4 : left + 8], to_bytes(made))
    metadata = read_text(path)
    assert metadata["captions"].splitlines() == [f"caption {i}" for i in range(6)]
    assert (metadata["stage"], metadata["samples"], metadata["seed"]) == ("tiny", "32", "0")


def test_images_leave_no_trace_in_training(tmp_path):
    class Draws(TinyStage):
        def generate(self, batch, seed):
            assert not self.training and not torch.is_grad_enabled()
            return super().generate(batch, seed) + torch.randn_like(batch["image"])

    torch.manual_seed(0)
    watched = fit(tmp_path, SampleGrid(num=6), stage=Draws())
    torch.manual_seed(0)
    alone = fit(tmp_path)
    for name, weight in alone.state_dict().items():
        assert torch.equal(watched.state_dict()[name], weight)


def test_a_stage_that_makes_no_images_is_left_alone(tmp_path):
    class Mute(LightningModule):
        name = "mute"

        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def training_step(self, batch, batch_idx):
            return self.layer(batch["image"].mean()[None]).sum()

        def validation_step(self, batch, batch_idx):
            pass

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters())

    fit(tmp_path, SampleGrid(num=6), stage=Mute())
    assert not (tmp_path / "images").exists()


WANDB_RUN = """
import sys
sys.path.insert(0, {tests!r})
from lightning.pytorch.loggers import WandbLogger
from tiny_stage import TinyStage, loader, trainer
from ldm.callbacks.sample_grid import SampleGrid

log = WandbLogger(save_dir={folder!r}, project="test")
run = trainer({folder!r}, callbacks=[SampleGrid(num=3)], logger=log, max_steps=4)
run.fit(TinyStage(), loader(100), loader(4))
"""


@pytest.mark.slow
def test_wandb_has_the_images_offline(tmp_path):
    code = WANDB_RUN.format(tests=os.path.dirname(tiny_stage.__file__), folder=str(tmp_path))
    quiet = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DATA_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | quiet, cwd=os.getcwd())
    (run,) = tmp_path.glob("wandb/offline-run-*")
    stored = sorted((run / "files" / "media" / "images").glob("images_*.png"))
    assert [path.read_bytes() for path in stored] == [
        path.read_bytes() for path in tmp_path.glob("images/*.png")
    ]
    assert len(stored) == 1
    leet = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run)]
    records = subprocess.run(leet, check=True, env=os.environ | quiet, capture_output=True, text=True).stdout
    assert "images" in records and "caption 2" in records


def test_an_image_grid_that_cannot_be_drawn_or_written_does_not_stop_training(tmp_path):
    class Fails(TinyStage):
        def generate(self, batch, seed):
            raise RuntimeError("out of memory")

    with pytest.warns(UserWarning, match=r"images: .* cannot be drawn \(RuntimeError: out of memory\)"):
        fit(tmp_path / "one", SampleGrid(num=6), stage=Fails())
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "images").write_text("no folder")
    with pytest.warns(UserWarning, match=r"images: .* cannot be written \(FileExistsError"):
        fit(tmp_path / "two", SampleGrid(num=6))

"""Arithmetic that is counted is what a closed form says, and nothing of training is touched."""

import pytest
import torch
from tiny_stage import TinyStage, loader, trainer
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ldm.callbacks.throughput import Throughput
from ldm.callbacks.utilization import PHASES, Utilization
from ldm.losses import R1, Adversarial
from ldm.nets.discriminator import PatchGAN

CPU = torch.device("cpu")


class Linear(TinyStage):
    """Maps the 48 numbers of an image to themselves, linearly."""

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(48, 48)

    def forward(self, image):
        return self.map(image.flatten(1)).view_as(image)


def fitted(folder, *callbacks):
    stage = Linear()
    stage.load_state_dict(torch.load(folder / "begin.pt"))
    run = trainer(folder, callbacks=list(callbacks), max_steps=6, log_every_n_steps=2)
    run.fit(stage, loader(), loader(4))
    return stage, run


def test_the_first_batch_is_counted_and_training_is_the_same(tmp_path):
    torch.save(Linear().state_dict(), tmp_path / "begin.pt")
    torch.manual_seed(0)
    plain, _ = fitted(tmp_path)
    torch.manual_seed(0)
    stage, run = fitted(tmp_path, Throughput(utilization=True))
    values = {name: value.item() for name, value in run.logged_metrics.items()}
    # forwards, and backwards for the weights: the image needs no gradient
    assert values["train/gflop_per_sample"] == pytest.approx(2 * 2 * 48 * 48 / 1e9)
    assert 0 < values["train/mfu"] < 1
    assert sum(values[f"train/time_{name}"] for name in PHASES) == pytest.approx(1)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), stage.parameters(), strict=True))


def test_utilization_is_arithmetic_over_time_over_the_peak():
    found = Utilization(CPU, torch.float32)
    found.begin(is_timed=False)
    torch.ones(4, 8) @ torch.ones(8, 16)
    found.end_passes(num_samples=4)
    found.begin(is_timed=False)
    torch.ones(400, 8) @ torch.ones(8, 16)  # counted once
    found.end_passes(num_samples=4)
    assert found.flops_per_sample == 2 * 8 * 16
    found.peak = 1024.0
    assert found.values(rate=2.0) == {"train/mfu": 0.5, "train/gflop_per_sample": 256e-9}


def test_an_error_ends_the_counting(tmp_path):
    class Fails(TinyStage):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        trainer(tmp_path, callbacks=[Throughput(utilization=True)]).fit(Fails(), loader())
    assert not torch.utils._python_dispatch.is_in_torch_dispatch_mode()


def test_a_gradient_within_the_forward_pass_is_counted_too():
    """That of R1, which the counter's hooks would refuse."""
    judge = Adversarial(PatchGAN(4, 1, "none"), regularizers=[R1()])
    image = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = Utilization(CPU, torch.float32)
    found.begin(is_timed=False)
    judge.own_loss({"image": image}, {"image": image}).mean().backward()
    found.end_passes(num_samples=2)
    counted = FlopCounterMode(display=False)
    with counted:
        judge.discriminator(torch.cat([image, image]))
    assert found.flops_per_sample > 3 * counted.get_total_flops() / 2  # both passes, and the second gradient

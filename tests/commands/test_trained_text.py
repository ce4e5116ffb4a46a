"""A text tower that is trained along with its denoiser, by the real command."""

import pytest
import torch

from ldm import fit
from ldm.conditioners.text import CLIPText
from ldm.io.checkpoint import Checkpoint
from ldm.stages.diffusion import Diffusion
from ldm.stages.load import load_stage

pytestmark = pytest.mark.slow

TRAINED = "--model.conditioner.frozen=false"
PREFIX = "conditioner.text."


def test_it_is_averaged_and_saved_like_the_denoiser(fresh):
    assert fit.main(fresh.arguments("diffusion", TRAINED)) == 0
    state = Checkpoint.open(fresh.runs / "diffusion").state
    (raw,) = [c["raw"] for c in state["callbacks"].values() if "raw" in c]
    text = {k: v for k, v in state["state_dict"].items() if k.startswith(PREFIX)}
    start = CLIPText("runs/demo/clip").tower.state_dict()
    assert set(text) == {PREFIX + k for k in start} == {k for k in raw if k.startswith(PREFIX)}
    assert all(not torch.equal(raw[k], v) for k, v in text.items()), "the checkpoint shows the average"
    assert all(not torch.equal(start[k.removeprefix(PREFIX)], v) for k, v in text.items())
    stage = load_stage(str(fresh.runs / "diffusion"), Diffusion)
    assert all(torch.equal(v, text[PREFIX + k]) for k, v in stage.conditioner.tower.state_dict().items())

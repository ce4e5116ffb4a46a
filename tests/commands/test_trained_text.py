"""A text tower that is trained along with its denoiser, by the real command."""

import json

import pytest
import torch
from transformers import CLIPTextModel

from ldm import convert, fit
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


def test_a_tower_from_scratch_needs_no_clip_and_leaves_as_stable_diffusions(fresh, tmp_path):
    arguments = {"width": 16, "layers": 1, "heads": 2, "context_length": 20}
    new = {"class_path": "NewText", "init_args": arguments}
    more = [f"--model.conditioner={json.dumps(new)}", "--trainer.max_steps=2"]
    assert fit.main(fresh.arguments("diffusion", *more)) == 0
    run = fresh.runs / "diffusion"
    assert list(Checkpoint.open(run).upstream) == ["runs/demo/autoencoder"]
    assert convert.main(["to-diffusers", f"--run={run}", f"--out={tmp_path / 'out'}"]) == 0
    theirs = CLIPTextModel.from_pretrained(tmp_path / "out" / "text_encoder")
    tower = load_stage(str(run), Diffusion).conditioner.tower
    ids = tower.tokenize(["a small red ring"])
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).last_hidden_state, tower(ids), rtol=1e-4, atol=1e-5)

"""CLIPs and text towers through the real command, between runs of the chain and other programs."""

import json

import open_clip
import pytest
import torch
from transformers import CLIPTextModel

from ldm import convert, fit
from ldm.conditioners.text import load_tower
from ldm.io.checkpoint import Checkpoint
from ldm.stages.load import CLIPTower

CAPTIONS = ["a large red ring", "two blue squares"]


def run(*arguments):
    return convert.main([str(a) for a in arguments])


@pytest.mark.slow
def test_a_clip_goes_to_open_clip_and_back_and_starts_a_run(fresh, tmp_path, capsys):
    there, back = tmp_path / "there", fresh.runs / "imported"
    assert run("to-open-clip", "--run=runs/demo/clip", f"--out={there}") == 0
    model = open_clip.create_model(f"local-dir:{there}").eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{there}")(CAPTIONS)
    with torch.no_grad():
        expected = CLIPTower("runs/demo/clip").encode_text(CAPTIONS)
        assert torch.allclose(model.encode_text(tokens, normalize=True), expected, atol=1e-6)
    record = json.loads((there / "ldm.json").read_text())
    assert record["weights"] == "ema" and record["sha256"] == Checkpoint.open("runs/demo/clip").sha256
    weights, config = there / "open_clip_model.safetensors", there / "open_clip_config.json"
    assert run("from-open-clip", f"--weights={weights}", f"--model={config}", f"--out={back}") == 0
    assert torch.equal(CLIPTower(str(back)).encode_text(CAPTIONS), expected)
    again = fresh.arguments("clip", f"--weights={back}", "--trainer.max_steps=1", "--model.optimizer.lr=0")
    assert fit.main([*again, "--model.optimizer.weight_decay=0"]) == 0
    found, first = (Checkpoint.open(folder).state["state_dict"] for folder in (fresh.runs / "clip", back))
    assert found.keys() == first.keys()
    assert all(torch.allclose(found[k], v, atol=1e-6) for k, v in first.items()), "a step of size 0"
    assert run("from-open-clip", f"--weights={weights}", f"--model={config}", f"--out={back}") == 2
    assert "already has checkpoints/last.ckpt" in capsys.readouterr().err


@pytest.mark.slow
def test_a_text_tower_goes_to_transformers_and_back_and_conditions_a_run(fresh, tmp_path):
    there, back = tmp_path / "there", fresh.runs / "imported"
    assert run("to-transformers", "--run=runs/demo/diffusion", f"--out={there}") == 0
    tower = load_tower(Checkpoint.open("runs/demo/clip"))
    with torch.no_grad():
        expected = tower.encode(CAPTIONS)
        found = CLIPTextModel.from_pretrained(there)(tower.tokenize(CAPTIONS)).last_hidden_state
    assert torch.allclose(found, expected, atol=1e-5)
    assert run("from-transformers", f"--folder={there}", f"--out={back}") == 0
    again = load_tower(Checkpoint.open(str(back)))
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in tower.state_dict().items())
    model = f"--model.conditioner.checkpoint={back}"
    assert fit.main(fresh.arguments("diffusion", model, "--trainer.max_steps=1")) == 0
    assert set(Checkpoint.open(fresh.runs / "diffusion").state["upstream"].values()) >= {
        Checkpoint.open(back).sha256
    }


def test_every_command_has_help(capsys):
    for name in convert.COMMANDS:
        try:
            convert.main([name, "--help"])
        except SystemExit as end:
            assert end.code == 0
        record = capsys.readouterr().out
        assert f"] {name} --" in record and "--out OUT" in record and "(required" in record


def test_bad_input_is_one_line(tmp_path, capsys):
    assert run("to-transformers", "--run=runs/demo/autoencoder", f"--out={tmp_path}") == 2
    assert "of stage 'autoencoder', expected stage 'clip' or 'text_tower'" in capsys.readouterr().err
    assert run("from-open-clip", "--weights=no.pt", "--model=ViT-B-33", f"--out={tmp_path}") == 2
    assert "got 'ViT-B-33', expected a model that open_clip knows" in capsys.readouterr().err

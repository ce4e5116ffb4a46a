"""Run folders of an imported model, and what of a run no Stable Diffusion can say."""

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_model import CAPTIONS, same, tiny

from ldm.interop import runs
from ldm.interop.diffusers import export_pipeline
from ldm.interop.runs import read_run, write_run
from ldm.io.checkpoint import Checkpoint
from ldm.stages.diffusion import Diffusion
from ldm.stages.load import build_stage, load_stage

SOURCE = {"program": "a test", "name": "tiny"}


@pytest.fixture
def run(tmp_path) -> Path:
    return write_run(tiny(), tmp_path / "ours", SOURCE)


def changed(run, change) -> Path:
    """The same checkpoint with another configuration."""
    state = Checkpoint.open(run).state
    change(state["config"]["init_args"])
    torch.save(state, run.parent / "changed.ckpt")
    return run.parent / "changed.ckpt"


def test_written_files_are_read(run):
    assert same(read_run(run), tiny())


def test_a_run_names_what_it_is_built_on_and_where_it_is_from(run):
    state = Checkpoint.open(run).state
    paths = [run.parent / name for name in ("autoencoder", "text")]
    upstream = {str(path): Checkpoint.open(path).sha256 for path in paths}
    assert state["upstream"] == upstream and state["source"] == SOURCE
    assert state["progress"] == {"steps": 0, "samples": 0}


def test_an_import_that_was_killed_is_repeated_and_a_whole_one_is_not_replaced(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(runs, "keep_upstream", lambda *_: (_ for _ in ()).throw(RuntimeError("killed")))
        write_run(tiny(), tmp_path / "again", SOURCE)
    assert (tmp_path / "again" / "diffusion" / "checkpoints" / "last.ckpt").exists()
    assert same(read_run(write_run(tiny(), tmp_path / "again", SOURCE)), tiny())
    for whole in (run.parent, tmp_path / "again"):
        with pytest.raises(ValueError, match="is there already, expected a folder without runs"):
            write_run(tiny(), whole, SOURCE)


def test_the_models_yaml_builds_the_stage_that_takes_its_weights(run):
    config = yaml.safe_load((run.parent / "model.yaml").read_text())["model"]
    stage = build_stage(config)
    stage.init_from(Checkpoint.open(run).state)
    stage.image_size, batch = 16, {"key": ["a"], "text": ["a red ring"]}
    assert torch.equal(stage.eval().generate(batch, 0), load_stage(str(run), Diffusion).generate(batch, 0))


def test_an_export_has_the_text_tower_that_was_trained_along(run, tmp_path):
    state = Checkpoint.open(run).state
    state["config"]["init_args"]["conditioner"]["init_args"]["frozen"] = False
    tower = load_stage(str(run), Diffusion).conditioner.tower
    trained = {name: tensor + 0.01 for name, tensor in tower.state_dict().items()}
    state["state_dict"] |= {f"conditioner.text.{name}": tensor for name, tensor in trained.items()}
    torch.save(state, tmp_path / "trained.ckpt")
    folder = export_pipeline(tmp_path / "trained.ckpt", tmp_path / "out")
    found = load_file(folder / "text_encoder" / "model.safetensors")
    found = {name.removeprefix("text_model."): tensor for name, tensor in found.items()}
    assert found.keys() == trained.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in trained.items())


def set_flow(args):
    args["objective"]["init_args"] = {
        "schedule": {"class_path": "ldm.diffusion.schedule.RectifiedFlow"},
        "prediction": {"class_path": "ldm.diffusion.prediction.Velocity"},
    }


def set_flow_prediction(args):
    args["objective"]["init_args"]["prediction"] = {"class_path": "ldm.diffusion.prediction.Flow"}


def set_edm(args):
    args["objective"]["init_args"]["prediction"] = {"class_path": "ldm.diffusion.prediction.EDM"}


def set_variance_exploding(args):
    args["objective"]["init_args"]["schedule"] = {"class_path": "ldm.diffusion.VarianceExploding"}


def set_two_captions(args):
    two = [args["conditioner"], args["conditioner"]]
    args["conditioner"] = {
        "class_path": "ldm.conditioners.composite.Composite",
        "init_args": {"conditioners": two},
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_flow, r"model\.objective\.schedule is a RectifiedFlow, expected one with alpha\^2"),
        (
            set_flow_prediction,
            r"model\.objective\.prediction is Flow, expected Epsilon or Velocity or X0",
        ),
        (set_edm, r"model\.objective\.prediction is EDM, expected Epsilon or Velocity or X0"),
        (
            set_variance_exploding,
            r"model\.objective\.schedule is a VarianceExploding, expected one with alpha",
        ),
        (
            set_two_captions,
            r"model\.conditioner is CLIPText and CLIPText, expected CLIPText, or CLIPText and Inpain",
        ),
    ],
)
def test_features_that_stable_diffusion_lacks_are_named_by_key(run, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        export_pipeline(changed(run, change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_captions_matter(run):
    stage = load_stage(str(run), Diffusion)
    images = stage.generate({"key": ["a"] * 3, "text": CAPTIONS}, 0)
    assert (images[0] - images[1]).abs().max() > 0.01

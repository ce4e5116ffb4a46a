"""A loss term with trained parameters is one class and some lines of YAML; tests/support/matching_term.py."""

import json

import pytest
import torch
from comparing import assert_equal, assert_same_run, error_of, metrics, state
from safetensors.torch import load_file
from tiny_runs import Chain

from ldm import convert, encode, fit
from ldm.latents.space import AutoencoderLatents
from ldm.stages.autoencoder import Autoencoder
from ldm.stages.load import load_stage

PROJECTOR = ["terms.2.projector.weight", "terms.2.projector.bias"]


def term(weight, recipe="AdamW", lr=0.01):
    optimizer = {
        "class_path": f"ldm.optim.recipes.{recipe}",
        "init_args": {"lr": lr, "warmup": 1, "decay": "none"},
    }
    arguments = {"channels": 4, "weight": weight, "optimizer": optimizer}
    losses = [{"class_path": "matching_term.FeatureMatching", "init_args": arguments}]
    return f"--model.losses={json.dumps(losses)}"


@pytest.fixture(scope="module")
def trained(home, tmp_path_factory):
    """A run of the demo's autoencoder, which Muon trains, with a term that AdamW trains."""
    runs = tmp_path_factory.mktemp("terms")
    fresh = Chain(runs, home / "shards" / "shapes", home / "shards" / "shapes-latents")
    assert fit.main(fresh.arguments("autoencoder", term(2.0))) == 0
    return runs / "autoencoder"


def test_a_term_trains_by_its_own_recipe_and_is_logged(chain, trained):
    saved = state(trained)
    (optimizer,) = saved["optimizer_states"]
    assert [group.get("orthogonal") for group in optimizer["param_groups"]] == [True, False, None, None]
    assert [group["lr"] for group in optimizer["param_groups"]][2:] == [0.01, 0.01]  # a schedule of its own
    rows = metrics(trained)
    logged = [float(row["train/matching"]) for row in rows if row["train/matching"]]
    assert len(logged) == 8 and logged[-1] < logged[0]
    assert sum(bool(row["val/matching"]) for row in rows) == 2
    first = {row["train/reconstruction"] for row in (rows[0], metrics(chain.runs / "autoencoder")[0])}
    assert len(first) == 1  # the same weights at first
    moments = optimizer["state"][max(optimizer["state"])]
    assert moments["step"] == 8 and moments["exp_avg"].abs().sum() > 0
    assert saved["progress"] == {"steps": 8, "samples": 64}


@pytest.mark.slow
def test_a_run_with_a_term_resumes_bit_for_bit(trained, fresh):
    stop = ["--trainer.callbacks+=interruptions.Stop", "--trainer.callbacks.step=5"]
    with pytest.raises(RuntimeError, match="the machine went away"):
        fit.main(fresh.arguments("autoencoder", term(2.0), *stop, "--trainer.callbacks.where=start"))
    assert state(fresh.runs / "autoencoder")["progress"] == {"steps": 5, "samples": 40}
    assert fit.main(fresh.arguments("autoencoder", term(2.0))) == 0
    assert_same_run(fresh.runs / "autoencoder", trained)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["AdamW", "Muon"])
def test_a_term_of_weight_0_changes_neither_weights_nor_average(chain, fresh, recipe):
    assert fit.main(fresh.arguments("autoencoder", term(0.0, recipe))) == 0
    ours, plain = state(fresh.runs / "autoencoder"), state(chain.runs / "autoencoder")
    for weights in (ours["state_dict"], plain["state_dict"]):
        for name in PROJECTOR:
            weights.pop(name, None)
    assert_equal(ours["state_dict"], plain["state_dict"])
    assert_equal(ours["callbacks"]["EMA"], plain["callbacks"]["EMA"])


def test_parameters_of_a_term_are_saved_but_not_averaged(trained):
    saved = state(trained)
    assert [name for name in saved["state_dict"] if name.startswith("terms.")] == PROJECTOR
    raw = saved["callbacks"]["EMA"]["raw"]
    assert raw.keys() == {name for name in saved["state_dict"] if name.startswith("net.")}
    stage = load_stage(str(trained), Autoencoder)
    assert torch.equal(stage.terms[2].projector.weight, saved["state_dict"][PROJECTOR[0]])
    assert set(stage.averaged_parameters()) == raw.keys()


@pytest.mark.slow
def test_parameters_of_a_term_are_not_exported(trained, chain, fresh, tmp_path):
    assert not any("projector" in name for name in AutoencoderLatents(str(trained)).net.module.state_dict())
    shards = fresh.shards / "train-{000000..000002}.tar"
    latents = tmp_path / "latents"
    assert encode.main([f"--autoencoder={trained}", f"--shards={shards}", f"--out={latents}"]) == 0
    upstream = [
        f"--model.latents.checkpoint={trained}",
        f"--data.train={latents}/train-{{000000..000002}}.tar",
    ]
    assert fit.main(fresh.arguments("diffusion", *upstream)) == 0
    out = tmp_path / "diffusers"
    assert convert.main(["to-diffusers", f"--run={fresh.runs / 'diffusion'}", f"--out={out}"]) == 0
    names = {name for path in out.rglob("*.safetensors") for name in load_file(path)}
    assert names and not any("projector" in name or "terms" in name for name in names)


def test_weights_of_a_run_with_a_term_start_one_without(trained, fresh):
    start = [f"--weights={trained}", "--trainer.max_steps=1", "--trainer.val_check_interval=1"]
    assert fit.main(fresh.arguments("autoencoder", *start)) == 0


def test_two_terms_of_one_name_are_refused(fresh, capsys):
    twice = json.dumps([{"class_path": "ldm.losses.kl.KL", "init_args": {"weight": 1.0}}])
    error = error_of(capsys, fresh.arguments("autoencoder", f"--model.losses={twice}"))
    assert "model.losses: got reconstruction, kl, kl, expected distinct names" in error

"""CLIP under FSDP2 on two processes (gloo) is DDP but for rounding, its checkpoints of the same format."""

import contextlib
import json
import math

import pytest
import torch
from one_after_another import fit_all
from safetensors.torch import load_file

from ldm import fit
from ldm.interop.open_clip import export_clip

SETTINGS = [
    "--model.optimizer.class_path=ldm.optim.recipes.AdamW",
    "--model.optimizer.lr=1e-3",
    "--model.optimizer.warmup=1",
    "--model.optimizer.decay=none",
    "--trainer.devices=2",
    "--trainer.max_steps=6",
    "--trainer.val_check_interval=3",
    "--trainer.limit_val_batches=2",
    "--checkpoints.keep_every_n_steps=3",
    "--data.batch_size=4",
    "--ema.decay=0.5",
    "--watchdog.timeout=120",
]
SIGMOID = ["--model.net.init_logit_bias=-10", "--model.loss=Sigmoid"]


@pytest.fixture(scope="module")
def runs(chain, home, tmp_path_factory):
    """Folders of runs of six steps, by their strategy and loss; some continue another one's third step."""
    folder = tmp_path_factory.mktemp("fsdp-clip")

    def step(name, strategy, *more, half_of=None):
        to = folder / name
        arguments = [*SETTINGS, f"--trainer.strategy={strategy}", f"--run={to}", *more]
        begun = half_of and str(folder / half_of / "checkpoints" / "step=00000003.ckpt")
        return {"start": begun, "run": str(to), "arguments": chain.arguments("clip", *arguments)}

    plan = [
        step("ddp", "ddp"),
        step("fsdp", "fsdp2"),
        step("again", "fsdp2", half_of="fsdp"),
        step("moved", "ddp", half_of="fsdp"),
        step("sigmoid ddp", "ddp", *SIGMOID),
        step("sigmoid fsdp", "fsdp2", *SIGMOID, "--model.micro_batch=3"),
    ]
    fit_all(plan, folder / "plan.json", home)
    return folder


def saved(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def distance(one, two):
    """Norm of the difference of tensors of the same names, relative to the norm of all."""
    assert one.keys() == two.keys()
    pairs = [(one[name].double(), two[name].double()) for name in one]
    return (sum((a - b).square().sum() for a, b in pairs) / sum(a.square().sum() for a, _ in pairs)) ** 0.5


def moments(state, name):
    return {i: values[name] for i, values in state["optimizer_states"][0]["state"].items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("one", "other"), [("ddp", "fsdp"), ("ddp", "moved"), ("sigmoid ddp", "sigmoid fsdp")]
)
def test_steps_are_the_same_however_weights_are_split(runs, one, other):
    ours, theirs = saved(runs / one), saved(runs / other)
    for found in (ours["state_dict"], theirs["state_dict"]):
        assert found["net.model.logit_scale"].shape == (1,)
    assert distance(ours["state_dict"], theirs["state_dict"]) < 2e-5  # up to 0.7e-5 measured
    for name in ("exp_avg", "exp_avg_sq"):  # of all gradients so far
        assert distance(moments(ours, name), moments(theirs, name)) < 2e-5  # 0.5e-5
    raw, other_raw = (each["callbacks"]["EMA"]["raw"] for each in (ours, theirs))
    starts = {"net.model.logit_scale": math.log(1 / 0.07)}
    if "sigmoid" in one:
        starts = {"net.model.logit_scale": math.log(10.0), "net.model.logit_bias": -10.0}
    for name, start in starts.items():
        moved = raw[name] - start
        assert abs(float(moved)) > 1e-3  # it was trained
        assert torch.allclose(other_raw[name] - start, moved, rtol=1e-2)


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_with_the_same_bits(runs):
    one, two = (saved(runs / name)["state_dict"] for name in ("fsdp", "again"))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.slow
def test_a_run_of_an_ldm_with_single_numbers_is_resumed(runs, chain, home, tmp_path):
    state = torch.load(runs / "ddp" / "checkpoints" / "step=00000003.ckpt", weights_only=True)
    moments = state["optimizer_states"][0]["state"].values()
    for values in (state["state_dict"], state["callbacks"]["EMA"]["raw"], *moments):
        values.update({k: v.reshape(()) for k, v in values.items() if k != "step" and v.shape == (1,)})
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    torch.save(state, tmp_path / "run" / "checkpoints" / "last.ckpt")
    with contextlib.chdir(home):
        settings = [s for s in SETTINGS if "devices" not in s and "batch_size" not in s]
        assert fit.main(chain.arguments("clip", *settings, f"--run={tmp_path / 'run'}")) == 0
    one, two = (saved(path)["state_dict"] for path in (runs / "ddp", tmp_path / "run"))
    assert one["net.model.logit_scale"].shape == two["net.model.logit_scale"].shape
    assert distance(one, two) < 2e-5


@pytest.mark.slow
def test_a_checkpoint_of_split_weights_is_exported_to_open_clip(runs, tmp_path):
    import open_clip

    folder = export_clip(runs / "sigmoid fsdp", tmp_path / "out")
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    theirs = open_clip.CLIP(**config)
    theirs.load_state_dict(load_file(folder / "open_clip_model.safetensors"))
    assert theirs.logit_scale.shape == theirs.logit_bias.shape == ()

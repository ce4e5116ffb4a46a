"""FSDP2 on two processes and HSDP on four (gloo) are DDP but for rounding, their checkpoints the run's."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from one_after_another import PROGRAM, fit_all
from PIL import Image
from safetensors.torch import load_file
from tiny_runs import ROOT
from torchvision.transforms.functional import pil_to_tensor

from ldm import fit
from ldm.distributed.fsdp import split

SETTINGS = [
    "--model.optimizer.class_path=ldm.optim.recipes.AdamW",
    "--model.optimizer.lr=1e-4",
    "--model.optimizer.warmup=1",
    "--model.optimizer.decay=none",
    "--trainer.gradient_clip_val=0.05",
    "--trainer.devices=2",
    "--trainer.max_steps=10",
    "--trainer.val_check_interval=5",
    "--checkpoints.keep_every_n_steps=5",
    "--trainer.limit_val_batches=2",
    "--data.batch_size=4",
    "--ema.decay=0.5",
    "--trainer.callbacks+=PostHocEMA",
    "--trainer.callbacks.every_n_steps=5",
    "--watchdog.timeout=120",
    "--sample_grid.num=9",  # the first process draws twice, the second once: they do not keep step
]


@pytest.fixture(scope="module")
def runs(chain, home, tmp_path_factory):
    """Folders of runs of ten steps: through, or begun with one strategy and continued with another."""
    folder = tmp_path_factory.mktemp("fsdp")

    def step(name, strategy, half_of=None, more=()):
        to = folder / name
        strategy = f"--trainer.strategy={strategy}"
        arguments = chain.arguments("diffusion", *SETTINGS, strategy, f"--run={to}", *more)
        start = half_of and str(folder / half_of / "checkpoints" / "step=00000005.ckpt")
        return {"start": start, "run": str(to), "arguments": arguments}

    plan = [
        step("ddp", "ddp"),
        step("fsdp", "fsdp2"),
        step("fsdp fsdp", "fsdp2", "fsdp"),
        step("fsdp ddp", "ddp", "fsdp"),
        step("ddp fsdp", "fsdp2", "ddp"),
        step(
            "again",
            "fsdp2",
            more=["--trainer.callbacks+=ldm.callbacks.activation_checkpointing.ActivationCheckpointing"],
        ),
    ]
    fit_all(plan, folder / "plan.json", home)
    return folder


KERNELS = ("/fused", "/foreach")
"""How AdamW computes: fused where weights are not sharded."""


def flat(tree, path=""):
    """Tensors and other leaves of a checkpoint by their path."""
    if isinstance(tree, dict):
        tree = tree.items()
    elif isinstance(tree, list | tuple):
        tree = enumerate(tree)
    else:
        return {path: tree}
    return {key: leaf for name, value in tree for key, leaf in flat(value, f"{path}/{name}").items()}


def saved(run):
    return flat(torch.load(run / "checkpoints" / "last.ckpt", weights_only=True))


def distance(one, two, part):
    """Norm of the difference of all tensors whose path has ``part``, relative to the norm of all."""
    pairs = [(one[k].double(), two[k].double()) for k in one if part in k and torch.is_tensor(one[k])]
    assert len(pairs) > 10
    return (sum((a - b).square().sum() for a, b in pairs) / sum(a.square().sum() for a, _ in pairs)) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize("other", ["fsdp", "fsdp ddp", "ddp fsdp"])
def test_ten_steps_are_the_same_however_weights_are_split(runs, other):
    one, two = saved(runs / "ddp"), saved(runs / other)
    assert one.keys() == two.keys()
    for key, ours in one.items():
        if torch.is_tensor(ours):
            assert (ours.shape, ours.dtype) == (two[key].shape, two[key].dtype), key
        elif not key.endswith(KERNELS):
            assert ours == two[key], key
    assert distance(one, two, "/state_dict/") < 1e-6  # 0.1e-6 measured
    assert distance(one, two, "/raw/") < 1e-6
    assert distance(one, two, "/averages/") < 1e-6
    assert distance(one, two, "/exp_avg") < 2e-5  # of all gradients so far; 3e-6 measured
    assert distance(one, two, "/exp_avg_sq") < 2e-5


@pytest.mark.slow
def test_snapshots_of_averages_hold_full_weights(runs):
    paths = [runs / name / "averages" / "step=00000010.safetensors" for name in ("ddp", "fsdp fsdp")]
    one, two = ({f"/{name}": value for name, value in load_file(path).items()} for path in paths)
    assert one.keys() == two.keys() and distance(one, two, "/1.") < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("other", ["fsdp fsdp", "again"])
def test_a_run_that_was_stopped_or_computes_its_blocks_again_ends_alike(runs, other):
    one, two = saved(runs / "fsdp"), saved(runs / other)
    assert one.keys() == two.keys()
    for key, ours in one.items():
        assert torch.equal(ours, two[key]) if torch.is_tensor(ours) else ours == two[key], key


@pytest.mark.slow
def test_images_from_sharded_weights_equal_those_from_full_weights(runs):
    ddp, fsdp = (sorted((runs / name / "images").glob("*.png")) for name in ("ddp", "fsdp"))
    assert [path.name for path in ddp] == [path.name for path in fsdp] and len(ddp) >= 4
    for ours, theirs in zip(ddp, fsdp, strict=True):
        ours, theirs = (pil_to_tensor(Image.open(path)).int() for path in (ours, theirs))
        assert (ours - theirs).abs().max() <= 1  # of 255


@pytest.mark.slow
def test_ten_steps_are_the_same_with_weights_split_within_each_of_two_nodes(chain, runs, tmp_path):
    folder, plan = tmp_path / "hsdp", tmp_path / "plan.json"
    more = ["--trainer.strategy=hsdp", "--data.batch_size=2", f"--run={folder}"]
    more += ["--trainer.val_check_interval=10", "--sample_grid.num=1"]
    step = {"arguments": chain.arguments("diffusion", *SETTINGS, *more)}
    plan.write_text(json.dumps([step]))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    meeting = ["--nnodes=2", "--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={port}"]
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *meeting, f"--node-rank={rank}", PROGRAM, plan],
            cwd=chain.runs.parents[1], env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        for rank in range(2)
    ]  # fmt: skip
    assert [node.wait(250) for node in nodes] == [0, 0]
    one, two = saved(runs / "ddp"), saved(folder)
    assert one.keys() == two.keys()
    assert distance(one, two, "/state_dict/") < 1e-6
    assert distance(one, two, "/exp_avg") < 2e-5


@pytest.mark.slow
def test_parameters_of_loss_terms_are_split_trained_and_saved_like_others(chain, fresh, home, tmp_path):
    recipe = {"class_path": "ldm.optim.AdamW", "init_args": {"lr": 0.01, "warmup": 1, "decay": "none"}}
    term = {"class_path": "matching_term.FeatureMatching", "init_args": {"channels": 4, "optimizer": recipe}}
    settings = [s for s in SETTINGS if "max_steps" not in s and "val_check" not in s]
    judge = {"class_path": "PatchGAN", "init_args": {"channels": 8, "num_layers": 2, "norm": "spectral"}}
    game = {"class_path": "Adversarial", "init_args": {"discriminator": judge, "start": 8}}
    settings += [
        f"--model.losses={json.dumps([term, game])}",
        "--trainer.max_steps=3",
        "--trainer.val_check_interval=3",
    ]
    plan = [
        {
            "arguments": fresh.arguments(
                "autoencoder", *settings, f"--trainer.strategy={s}", f"--run={tmp_path / s}"
            )
        }
        for s in ("ddp", "fsdp2")
    ]
    fit_all(plan, tmp_path / "plan.json", home)
    one, two = saved(tmp_path / "ddp"), saved(tmp_path / "fsdp2")
    assert one.keys() == two.keys()
    for name in ("weight", "bias"):
        weight = one[f"/state_dict/terms.2.projector.{name}"]
        assert torch.allclose(weight, two[f"/state_dict/terms.2.projector.{name}"], atol=1e-6)
    assert not any("/raw/terms." in key for key in two)  # not averaged
    judges = [key for key in one if "state_dict/terms.3.discriminator" in key]
    assert len(judges) == 4 * 3 and all(torch.allclose(one[key], two[key], atol=1e-5) for key in judges)
    assert distance(one, two, "/state_dict/") < 1e-5


def test_weights_that_cannot_be_split_are_named():
    module = torch.nn.Linear(2, 2)
    module.scale = torch.nn.Parameter(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"FSDP2 cannot split scale, a single number, .* of shape \(1,\)"):
        split(module, None)


def test_a_strategy_that_splits_weights_another_way_is_refused(fresh, capsys):
    other = "--trainer.strategy.class_path=lightning.pytorch.strategies.ModelParallelStrategy"
    assert fit.main(fresh.arguments("autoencoder", other, "--trainer.devices=1")) == 2
    assert (
        "trainer.strategy: got ModelParallelStrategy, expected auto, ddp, fsdp2 or hsdp"
        in capsys.readouterr().err
    )

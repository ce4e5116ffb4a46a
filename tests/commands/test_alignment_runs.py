"""A routed transformer aligned with one's own CLIP: trained, resumed bit for bit, then free of it."""

import json
import shutil

import pytest
from comparing import assert_same_run, error_of, metrics, state
from one_after_another import fit_all

from ldm import fit, sample

pytestmark = pytest.mark.slow


ROUTE = {"class_path": "Sprint", "init_args": {"first": 1, "last": 2, "drop": 0.3}}
DIT = {"patch_size": 2, "hidden": 32, "depth": 4, "heads": 2, "routing": ROUTE}


PLAIN = ["--model.optimizer.class_path=exact.SGD", "--model.optimizer.lr=0.1", "--model.optimizer.warmup=1"]


def aligned(chain, clip, block="mid_block.resnets.1", **more):
    tower = {"class_path": "ldm.stages.load.CLIPTower", "init_args": {"checkpoint": str(clip)}}
    head = {"class_path": "MLPHead", "init_args": {"width": 8}}
    layer = "model.visual.transformer.resblocks.2"
    recipe = {"class_path": "AdamW", "init_args": {"lr": 0.03, "warmup": 1, "decay": "none"}}
    given = {"extractor": tower, "block": block, "layer": layer, "head": head, "optimizer": recipe, **more}
    term = {"class_path": "Alignment", "init_args": given}
    images = f"--data.train={chain.shards}/train-{{000000..000002}}.tar"
    return [f"--model.losses={json.dumps([term])}", images]


def test_it_resumes_bit_for_bit_and_is_drawn_from_without_the_clip(chain, fresh, tmp_path):
    clip = shutil.copytree(chain.runs / "clip", tmp_path / "clip", ignore=shutil.ignore_patterns("upstream"))
    whole, resumed = f"--run={tmp_path / 'whole'}", f"--run={tmp_path / 'resumed'}"
    routed = f"--model.denoiser={json.dumps({'class_path': 'DiT', 'init_args': DIT})}"
    arguments = fresh.arguments("diffusion", *aligned(chain, clip, "transformer_blocks.0"), routed)
    assert fit.main([*arguments, whole]) == 0
    rows = [row for row in metrics(tmp_path / "whole") if row["train/alignment"]]
    assert len(rows) == 8 and float(rows[-1]["train/alignment"]) < float(rows[0]["train/alignment"]) < 2
    assert not any(name.startswith("val/alignment") for name in rows[0])
    stop = ["--trainer.callbacks+=interruptions.Stop", "--trainer.callbacks.step=5"]
    with pytest.raises(RuntimeError, match="the machine went away"):
        fit.main([*arguments, resumed, *stop, "--trainer.callbacks.where=start"])
    assert fit.main([*arguments, resumed]) == 0
    assert_same_run(tmp_path / "resumed", tmp_path / "whole")
    saved = state(tmp_path / "whole")
    projector = [name for name in saved["state_dict"] if name.startswith("terms.0.projector.")]
    assert len(projector) == 6 and not set(projector) & set(saved["callbacks"]["EMA"]["raw"])
    assert len(saved["frozen_networks"]) == 1
    shutil.rmtree(clip)
    out = [
        f"--checkpoint={tmp_path / 'whole'}",
        "--prompt=a red ring",
        "--steps=2",
        f"--out={tmp_path / 'x'}",
    ]
    assert sample.main(out) == 0


def test_two_processes_are_one_however_weights_are_split_and_batches_accumulated(
    chain, fresh, home, tmp_path
):
    routed = f"--model.denoiser={json.dumps({'class_path': 'DiT', 'init_args': DIT})}"
    align = aligned(chain, chain.runs / "clip", "transformer_blocks.0", optimizer=None)
    steps = ["--trainer.max_steps=3", "--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=6"]
    arguments = fresh.arguments("diffusion", *align, routed, *PLAIN, *steps)
    two = ["--data.batch_size=4", "--trainer.devices=2"]
    plan = [
        {"arguments": [*arguments, *two, f"--trainer.strategy={name}", f"--run={tmp_path / name}"]}
        for name in ("ddp", "fsdp2")
    ]
    fit_all(plan, tmp_path / "plan.json", home)
    assert fit.main([*arguments, f"--run={tmp_path / 'one'}"]) == 0
    one = state(tmp_path / "one")["state_dict"]
    for name in ("ddp", "fsdp2"):
        other = state(tmp_path / name)["state_dict"]
        assert one.keys() == other.keys()
        assert any(key.endswith("route_end.linear.weight") for key in one)
        differences = sum((other[key] - value).double().square().sum() for key, value in one.items())
        assert (differences / sum(value.double().square().sum() for value in one.values())).sqrt() < 1e-6
        for column in ("train/loss", "train/alignment", "val/loss"):
            ours, theirs = ([row[column] for row in metrics(tmp_path / run)] for run in ("one", name))
            assert [float(x) for x in theirs if x] == pytest.approx([float(x) for x in ours if x], rel=1e-4)


def test_a_block_that_is_not_there_and_shards_without_images_are_one_line(chain, fresh, capsys):
    arguments = aligned(chain, chain.runs / "clip", "mid_block.attentions.3")
    line = error_of(capsys, fresh.arguments("diffusion", *arguments), fit.main)
    assert (
        "the denoiser UNet has no block 'mid_block.attentions.3', expected such as mid_block.attentions.0"
        in line
    )
    latents = aligned(chain, chain.runs / "clip")[:1]
    line = error_of(capsys, fresh.arguments("diffusion", *latents), fit.main)
    assert "asks for ['image'], but the shard" in line

"""A routed transformer aligned with one's own CLIP: trained, resumed bit for bit, then free of it."""

import json
import shutil

import pytest
from comparing import assert_same_run, error_of, metrics, state

from ldm import fit, sample

pytestmark = pytest.mark.slow


ROUTE = {"class_path": "Sprint", "init_args": {"first": 1, "last": 2, "drop": 0.3}}
DIT = {"patch_size": 2, "hidden": 32, "depth": 4, "heads": 2, "routing": ROUTE}


def aligned(chain, clip, block="mid_block.resnets.1"):
    tower = {"class_path": "ldm.stages.load.CLIPTower", "init_args": {"checkpoint": str(clip)}}
    head = {"class_path": "MLPHead", "init_args": {"width": 8}}
    layer = "model.visual.transformer.resblocks.2"
    recipe = {"class_path": "AdamW", "init_args": {"lr": 0.03, "warmup": 1, "decay": "none"}}
    given = {"extractor": tower, "block": block, "layer": layer, "head": head, "optimizer": recipe}
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

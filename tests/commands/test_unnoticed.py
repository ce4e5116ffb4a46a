"""Real stages are trained bit for bit the same, measured or not: weights, buffers, layout, random numbers."""

import random

import numpy as np
import pytest
import torch
from comparing import assert_equal

from ldm import training
from ldm.callbacks.evaluation import Evaluation

RESIDUAL = "{image_size: 32, layers: [1, 1, 1, 1], width: 8, head_width: 8}"
"""An image tower of CLIP with batch norms."""


def reconstructions(chain):
    """Options that measure what an autoencoder shows: rFID in the eyes of a CLIP, and PSNR."""
    tower = f"{{class_path: ldm.stages.load.CLIPTower, init_args: {{checkpoint: {chain.runs / 'clip'}}}}}"
    clip = f"{{class_path: ldm.metrics.extractors.clip.CLIPExtractor, init_args: {{clip: {tower}}}}}"
    of_features = (
        "{class_path: ldm.metrics.feature_metrics.FeatureMetrics, init_args: "
        f"{{extractor: {clip}, measures: [ldm.metrics.frechet.Frechet]}}}}"
    )
    return [
        "--trainer.callbacks+=ldm.callbacks.evaluation.Evaluation",
        "--trainer.callbacks.num_samples=20",
        f"--trainer.callbacks.metrics=[{of_features}, ldm.metrics.psnr.PSNR]",
    ]


def trained(arguments, measured):
    """Train in this process; return what training left, and what was logged."""
    cli = training.build(arguments)
    evaluations = [c for c in cli.trainer.callbacks if isinstance(c, Evaluation)]
    assert evaluations
    if not measured:
        cli.trainer.callbacks = [c for c in cli.trainer.callbacks if c not in evaluations]
    cli.trainer.fit(cli.model, cli.datamodule)
    left = {
        "state": cli.model.state_dict(),
        "averages": next(c.shadow for c in cli.trainer.callbacks if hasattr(c, "shadow")),
        "optimizer": [optimizer.state_dict() for optimizer in cli.trainer.optimizers],
        "strides": {name: tensor.stride() for name, tensor in cli.model.state_dict().items()},
        "modes": {name: module.training for name, module in cli.model.named_modules()},
        "random": [torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()],
        "losses": {k: v for k, v in cli.trainer.callback_metrics.items() if "loss" in k},
    }
    return left, {name for name in cli.trainer.callback_metrics if name.startswith("val/")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("autoencoder", {"val/fid/clip", "val/psnr"}),
        ("clip", {"val/image_to_text@1/clip"}),
        ("clip-residual", {"val/text_to_image@10/clip"}),
        ("diffusion", {"val/fid/clip", "val/clip_score/clip", "val/caption/all"}),
    ],
)
def test_measuring_leaves_training_as_it_is(chain, tmp_path, name, values):
    more = {
        "autoencoder": reconstructions(chain),
        "clip-residual": [f"--model.net.vision_cfg={RESIDUAL}"],
    }.get(name, [])
    short = ["--trainer.logger=false", "--trainer.max_steps=6", "--trainer.val_check_interval=2"]
    command = chain.arguments(name.removesuffix("-residual"), *more, *short)
    measured, found = trained([*command, f"--run={tmp_path / 'measured'}"], measured=True)
    alone, others = trained([*command, f"--run={tmp_path / 'alone'}"], measured=False)
    assert values <= found and not values & others
    assert_equal(measured, alone)
    kernels = [t for t in measured["state"].values() if t.ndim == 4 and min(t.shape) > 1]
    assert kernels and all(t.is_contiguous(memory_format=torch.channels_last) for t in kernels)
    normed = any(key.endswith("running_var") for key in measured["state"])
    assert normed == (name == "clip-residual")

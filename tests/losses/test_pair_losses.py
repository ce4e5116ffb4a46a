"""Softmax and sigmoid over pairs: formulas, open_clip's losses, parts of a batch, and rings of processes."""

import math
import os

import open_clip
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from ldm.losses import Sigmoid, Softmax
from ldm.losses.contrastive import Pairs
from ldm.nets.clip import CLIPModel
from ldm.rng import SampleNoise
from ldm.stages.clip import CLIP

VISION = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 2, "head_width": 8}
TEXT = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
WORDS = ["red", "blue", "green", "red", "white", "black", "pink", "blue", "cyan", "grey", "red", "brown"]


def stage(loss, micro_batch=None):
    torch.manual_seed(0)
    bias = -3.0 if isinstance(loss, Sigmoid) else None
    return CLIP(CLIPModel(16, VISION, TEXT, init_logit_bias=bias), None, loss, micro_batch)


def batch():
    image = torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return {"image": image, "text": WORDS, "key": [str(i) for i in range(12)]}


def gradients(module, loss):
    module.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_near(found, wanted, name):
    """Equal to rounding, where contributions of many pairs cancel."""
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max(), name


def vectors(count=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(2, count, 8, generator=generator, dtype=torch.float64), dim=-1)


def test_sigmoid_is_open_clips_where_captions_differ():
    image, text = (v.requires_grad_() for v in vectors())
    scale, bias = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (7.0, -4.0))
    expected = open_clip.loss.SigLipLoss()(image, text, scale, bias)
    inputs = (image, text, scale, bias)
    wanted = torch.autograd.grad(expected, inputs)
    for rows in (None, 4):
        found, _ = Sigmoid()(Pairs(image, text, torch.arange(6), scale, bias, rows=rows))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(torch.autograd.grad(found, inputs), wanted, rtol=1e-12, atol=1e-15)


def test_sigmoid_decides_on_each_pair_and_equal_captions_belong_to_each_other():
    image, text = vectors(3)
    found, accuracy = Sigmoid()(
        Pairs(image, text, torch.tensor([5, 2, 5]), torch.tensor(7.0), torch.tensor(-4.0))
    )
    total = 0.0
    for i in range(3):
        for j in range(3):
            logit = 7.0 * float(image[i] @ text[j]) - 4.0
            sign = 1 if i == j or {i, j} == {0, 2} else -1
            total += math.log1p(math.exp(-sign * logit)) / 3
    assert float(found) == pytest.approx(total, rel=1e-6)
    nearest = (image @ text.T).argmax(1).tolist()
    own = [nearest[0] in (0, 2), nearest[1] == 1, nearest[2] in (0, 2)]
    assert float(accuracy) == pytest.approx(sum(own) / 3)


@pytest.mark.parametrize("loss", [Softmax(), Sigmoid()])
def test_parts_of_a_batch_have_the_gradient_of_the_whole(loss):
    whole, parts = stage(loss), stage(loss, micro_batch=5)
    data = batch()
    values = [s.losses(data, SampleNoise(0, data["key"])) for s in (whole, parts)]
    assert values[0].keys() == values[1].keys()
    for name in values[0]:
        torch.testing.assert_close(values[1][name], values[0][name], rtol=1e-5, atol=1e-6)
    wanted, found = (gradients(s, v["loss"]) for s, v in zip((whole, parts), values, strict=True))
    assert wanted.keys() == found.keys() == dict(whole.named_parameters()).keys()
    for name, gradient in wanted.items():
        assert_near(found[name], gradient, name)


def kept(micro_batch, data):
    """Bytes that the backward pass needs, without the images."""
    sizes = []

    def note(tensor):
        sizes.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        stage(Softmax(), micro_batch).losses(data, SampleNoise(0, data["key"]))
    return sum(sizes) - data["image"].nbytes


def test_parts_keep_the_activations_of_one():
    assert kept(2, batch()) < kept(None, batch()) / 10


@pytest.mark.parametrize(
    ("loss", "bias", "message"),
    [
        (Sigmoid(), None, "model.net.init_logit_bias: got none, expected the start of the bias"),
        (Softmax(), -10.0, "model.net.init_logit_bias: got a bias, expected none"),
    ],
)
def test_a_bias_belongs_to_the_sigmoid(loss, bias, message):
    with pytest.raises(ValueError, match=message):
        CLIP(CLIPModel(16, VISION, TEXT, init_logit_bias=bias), None, loss)


def test_batch_norm_has_no_parts():
    tower = {"image_size": 32, "width": 8, "layers": [1, 1, 1, 1], "head_width": 8}
    with pytest.raises(ValueError, match=r"model.micro_batch: the image tower has batch norm"):
        CLIP(CLIPModel(16, tower, TEXT), micro_batch=4)
    with pytest.raises(ValueError, match=r"model.micro_batch: got 0, expected at least 1"):
        CLIP(CLIPModel(16, VISION, TEXT), micro_batch=0)


class Contrast(torch.nn.Module):
    """The stage's loss on a part of the pairs, as a module for DDP."""

    def __init__(self, stage, rank, world):
        super().__init__()
        self.stage, self.rank, self.world = stage, rank, world

    def forward(self, image, text, captions):
        vectors = self.stage._encode(image, text)
        model = self.stage.net.model
        rest = (captions, model.logit_scale.exp(), model.logit_bias, self.rank, self.world)
        return self.stage.loss(Pairs(*vectors, *rest, self.stage.micro_batch))


def work(rank, world, loss, store, folder):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    data, each = batch(), 12 // world
    mine = slice(rank * each, (rank + 1) * each)
    module = DistributedDataParallel(Contrast(stage(loss, micro_batch=3), rank, world))
    captions = module.module.stage._caption_ids(WORDS)
    value, accuracy = module(data["image"][mine], WORDS[mine], captions)
    found = gradients(module.module.stage, value)
    image, text = (v.requires_grad_() for v in vectors(2, seed=rank))  # open_clip's ring: captions differ
    scale, bias = torch.tensor(7.0, dtype=torch.float64), torch.tensor(-4.0, dtype=torch.float64)
    theirs = open_clip.loss.SigLipLoss(rank=rank, world_size=world)(image, text, scale, bias)
    ring = torch.autograd.grad(theirs, (image, text))
    ours, _ = Sigmoid()(Pairs(image, text, torch.arange(2 * world), scale, bias, rank, world))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(ours, (image, text)), ring, rtol=1e-10, atol=1e-14)
    torch.save((value.detach(), accuracy, found), os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("loss", [Softmax(), Sigmoid()])
@pytest.mark.parametrize("world", [2, 3])
def test_processes_have_the_gradient_of_one(tmp_path, loss, world):
    alone, data = stage(loss), batch()
    values = alone.losses(data, SampleNoise(0, data["key"]))
    wanted = gradients(alone, values["loss"])
    arguments = (world, loss, str(tmp_path / "store"), str(tmp_path))
    mp.start_processes(work, arguments, nprocs=world, start_method="fork")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    for n, name in enumerate(("loss", "accuracy")):
        mean = torch.stack([found[n] for found in ranks]).mean()
        torch.testing.assert_close(mean, values[name].detach(), rtol=1e-5, atol=1e-6)
    for name, gradient in wanted.items():
        assert_near(ranks[0][2][name], gradient, name)
        assert torch.equal(ranks[0][2][name], ranks[-1][2][name])

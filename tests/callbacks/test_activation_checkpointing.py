"""Blocks computed again, and blocks compiled: the same numbers, with less memory or other kernels."""

import copy

import pytest
import torch
from tiny_stage import trainer
from torch import nn

from ldm.callbacks.activation_checkpointing import ActivationCheckpointing
from ldm.callbacks.compile import Compile
from ldm.nets.autoencoder import KLAutoencoder
from ldm.nets.clip import CLIPModel
from ldm.nets.unet import UNet
from ldm.types import Cond, DenoiserDims

TEXTS = ["a red ring", "two blue squares"]


def unet():
    net = UNet(DenoiserDims(sample=4, tokens=16), [16, 32], 1, [True, True], num_heads=2, norm_groups=4)
    x, t, cond = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), Cond(torch.randn(2, 5, 16))
    return net, lambda net: net(x, t, cond)


def autoencoder():
    image, noise = torch.randn(2, 3, 16, 16), torch.randn(2, 4, 8, 8)
    return KLAutoencoder(4, [16, 32], 1, 4), lambda net: net(image, noise)[0]


def clip():
    vision = {"image_size": 16, "patch_size": 4, "width": 32, "layers": 2, "head_width": 16}
    net = CLIPModel(16, vision, {"context_length": 12, "width": 32, "heads": 2, "layers": 2})
    image = torch.randn(2, 3, 16, 16)
    return net, lambda net: net.encode_image(image) @ net.encode_text(TEXTS).T


def made(network):
    torch.manual_seed(0)
    net, call = network()
    for p in net.parameters():
        nn.init.normal_(p, std=0.2)  # some begin as zeros
    return net, call


def of(callback, net, tmp_path):
    """Return a copy of a network, changed by a callback's setup."""
    stage = nn.ModuleDict({"net": copy.deepcopy(net)})
    callback.setup(trainer(tmp_path), stage, "fit")
    callback.on_fit_start(trainer(tmp_path), stage)
    return stage["net"]


def step(net, call, dtype):
    """The output, the gradients, and the bytes kept for the backward pass but for weights."""
    kept, weights = {}, {p.untyped_storage()._cdata for p in net.parameters()}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage  # alive: an address is not used twice
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
    ):
        y = call(net)
    size = sum(storage.nbytes() for storage in kept.values())
    y.float().square().mean().backward()
    return y, {name: p.grad for name, p in net.named_parameters() if p.grad is not None}, size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("network", [unet, autoencoder, clip])
def test_blocks_computed_again_give_the_same_gradients_and_keep_less(network, dtype, tmp_path):
    net, call = made(network)
    again = of(ActivationCheckpointing(), net, tmp_path)
    y, grads, kept = step(net, call, dtype)
    found_y, found, found_kept = step(again, call, dtype)
    assert torch.equal(found_y, y) and list(found) == list(grads)
    for name, grad in grads.items():
        assert torch.equal(found[name], grad), name
    assert found_kept < 0.35 * kept
    assert list(again.state_dict()) == list(net.state_dict())


@pytest.mark.parametrize("network", [unet, autoencoder, clip])
def test_a_copy_computes_with_its_own_weights(network, tmp_path):
    net, call = made(network)
    again = of(ActivationCheckpointing(), net, tmp_path)
    copied = copy.deepcopy(again)
    with torch.no_grad():
        before = call(again)
        for p in copied.parameters():
            p.zero_()
        assert torch.equal(call(again), before)
        assert not torch.equal(call(copied), before)


@pytest.mark.slow
@pytest.mark.parametrize(
    "callbacks",
    [[Compile("eager", on_cpu=True)], [ActivationCheckpointing(), Compile("aot_eager", on_cpu=True)]],
)
@pytest.mark.parametrize("network", [unet, autoencoder, clip])
def test_compiled_blocks_compute_the_same(network, callbacks, tmp_path):
    net, call = made(network)
    compiled = net
    for callback in callbacks:
        compiled = of(callback, compiled, tmp_path)
    y, grads, kept = step(net, call, torch.float32)
    found_y, found, found_kept = step(compiled, call, torch.float32)
    torch.testing.assert_close(found_y, y)
    for name, grad in grads.items():
        torch.testing.assert_close(found[name], grad, msg=name)
    assert list(compiled.state_dict()) == list(net.state_dict())
    if len(callbacks) > 1:
        assert found_kept < 0.5 * kept
    with torch.no_grad():
        torch.testing.assert_close(call(compiled), y)


def test_a_network_without_blocks_is_left_unchanged(tmp_path):
    net = nn.Linear(2, 2)
    for callback in (ActivationCheckpointing(), Compile("nonsense", on_cpu=True)):
        assert torch.equal(of(callback, net, tmp_path)(torch.ones(1, 2)), net(torch.ones(1, 2)))

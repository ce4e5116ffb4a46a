"""Kernels of a forward pass on a GPU, counted without one: what torch dispatches for fake tensors."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.nets.layers import GroupNorm
from ldm.nets.text import TextTower
from ldm.nets.unet import UNet
from ldm.types import Cond, DenoiserDims

FREE = {"detach", "view", "_unsafe_view", "t", "transpose", "unsqueeze", "expand", "slice", "split", "select"}
FREE |= {"permute", "alias", "as_strided", "empty", "empty_like", "device"}


class Launches(TorchDispatchMode):
    """Counts what computes: one kernel for each operator, views none."""

    def __init__(self):
        super().__init__()
        self.counts, self.copied = Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.__name__.partition(".")[0]
        if name not in FREE:
            self.counts[name] += 1
        if name == "_to_copy":
            self.copied += result.numel()
        return result


def forward(build, call):
    """Count a forward pass under autocast to bfloat16 on a GPU that is not there."""
    with FakeTensorMode(), torch.device("cuda"), Launches() as launches:
        net = build()
        launches.counts.clear()
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            call(net)
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.clear_autocast_cache()
    return launches


def test_group_norm_converts_nothing_of_the_size_of_its_input():
    x = {"device": "cuda", "dtype": torch.bfloat16}
    found = forward(lambda: GroupNorm(4, 8), lambda net: net(torch.empty(2, 8, 16, 16, **x)))
    assert found.counts["native_group_norm"] == 1 and found.copied == 16


class Attentions(TorchFunctionMode):
    """Collects the arguments of attention."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            self.calls.append(args[3:])
        return func(*args, **(kwargs or {}))


def test_text_towers_ask_for_causal_attention_without_a_mask():
    """Kernels that never hold all pairs of positions take no mask."""
    with Attentions() as found:
        TextTower(8, 2, 2)(torch.zeros(2, 77, dtype=torch.int64))
    assert found.calls == [(None, 0.0, True)] * 2


@pytest.mark.slow
def test_a_forward_pass_of_stable_diffusion_launches_no_more_kernels_than_now():
    dims = DenoiserDims(sample=4, tokens=768)

    def call(net):
        x, t = torch.empty(16, 4, 32, 32), torch.empty(16, dtype=torch.int64)
        net(x, t, Cond(torch.empty(16, 77, 768)))

    with torch.no_grad():
        found = forward(lambda: UNet(dims), call)
    assert found.counts.total() <= 1766, found.counts.most_common()

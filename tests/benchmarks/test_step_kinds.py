"""Operators of a step, added up by kind."""

import pytest
import torch

from benchmarks.step import KINDS, Clock, kind, train


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("convolution_backward.default", "convolutions"),
        ("addmm.default", "matrix products"),
        ("add.Tensor", "SiLU, GELU, sums and products"),
        ("_scaled_dot_product_flash_attention_for_cpu_backward.default", "attention"),
        ("native_group_norm_backward.default", "group and layer norm"),
        ("copy_.default", "copies"),
        ("view.default", "views and the rest"),
    ],
)
def test_the_longest_beginning_names_the_kind(name, expected):
    assert kind(name) == expected


def test_a_clock_hears_the_backward_pass_too():
    x, layer = torch.randn(2, 4, 8, 8), torch.nn.Conv2d(4, 4, 3)
    with torch.no_grad(), Clock() as forward:
        layer(x)
    with Clock() as both:
        train(lambda: layer(x).square().mean(), is_half=False)
    assert set(forward.seconds) == {"convolutions"}
    assert {"convolutions", "SiLU, GELU, sums and products"} <= set(both.seconds)
    assert set(both.seconds) <= {*KINDS, "views and the rest"}

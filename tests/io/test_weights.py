"""Weights that do not fit are listed by name."""

import pytest
import torch

from ldm.io.weights import check

EXPECTED = {f"layer.{i}": torch.Size([2, 3]) for i in range(5)}


def weights(change=None, **more):
    return {name: torch.zeros(shape) for name, shape in EXPECTED.items()} | (change or {}) | more


def test_weights_that_fit_pass():
    check(weights(), EXPECTED, "x")


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({}, "x: 5 of 5 weights missing (layer.0, layer.1, layer.2, ...)"),
        (weights(a=torch.ones(1)), "x: 1 weights not expected (a)"),
        (
            weights({"layer.1": torch.ones(3, 2)}),
            "x: 1 of 5 weights of another shape (layer.1 (3, 2) instead of (2, 3))",
        ),
    ],
)
def test_weights_that_do_not_are_listed(found, message):
    with pytest.raises(ValueError) as error:
        check(found, EXPECTED, "x")
    assert str(error.value) == message


def test_all_problems_are_reported_at_once():
    found = weights(other=torch.ones(1), **{"layer.4": torch.ones(2)})
    del found["layer.0"]
    with pytest.raises(
        ValueError, match=r"1 of 5 weights missing .*; 1 weights not .*; 1 of 5 weights of an"
    ):
        check(found, EXPECTED, "x")

import pytest
import torch

from ldm.diffusion.guidance import ClassifierFree, Unguided, clamped
from ldm.diffusion.prediction import Epsilon, Velocity, noise_of
from ldm.diffusion.schedule import Linear

X_T, T = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.tensor([10, 600])


def cond(x, t):
    return x.sin() + 1


def uncond(x, t):
    return x.cos()


def never(x, t):
    raise AssertionError("must not be evaluated")


def test_scale_one_and_unguided_never_ask_the_unconditional_model():
    for guidance in (ClassifierFree(1.0), Unguided()):
        assert torch.equal(guidance(cond, never)(X_T, T), cond(X_T, T))


def test_scale_zero_never_asks_the_conditional_model():
    assert torch.equal(ClassifierFree(0.0)(never, uncond)(X_T, T), uncond(X_T, T))


@pytest.mark.parametrize("scale", [0.5, 1.5, 7.5])
def test_the_combination_is_the_same_in_noise_velocity_and_x0(scale):
    alpha, sigma = (table[T].view(-1, 1, 1, 1) for table in (Linear().alpha, Linear().sigma))
    guided = ClassifierFree(scale)(cond, uncond)(X_T, T)
    eps_c, eps_u = (noise_of(f(X_T, T), X_T, alpha, sigma) for f in (cond, uncond))
    # Ho & Salimans 2022, Eq. 6: (1 + w) eps_c - w eps_u.
    eps = scale * eps_c - (scale - 1) * eps_u
    assert torch.allclose(Epsilon().x0(eps, X_T, alpha, sigma), guided, atol=1e-10)
    v_c, v_u = (Velocity().target(f(X_T, T), e, alpha, sigma) for f, e in ((cond, eps_c), (uncond, eps_u)))
    assert torch.allclose(Velocity().x0(v_u + scale * (v_c - v_u), X_T, alpha, sigma), guided, atol=1e-10)


def test_clamped_keeps_the_range_after_guidance():
    guided = ClassifierFree(7.5)(cond, uncond)
    assert guided(X_T, T).abs().max() > 1
    assert torch.equal(clamped(guided)(X_T, T), guided(X_T, T).clamp(-1, 1))
    assert clamped(guided, low=0.0, high=0.5)(X_T, T).min() == 0

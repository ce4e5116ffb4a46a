import pytest
import torch

from ldm.diffusion.guidance import (
    ClassifierFree,
    Interval,
    NegativePrompt,
    Rescaled,
    Unguided,
    clamped,
    extrapolated,
    inpainted,
)
from ldm.diffusion.prediction import Epsilon, Velocity, noise_of
from ldm.diffusion.schedule import Linear

X_T, T = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.tensor([10, 600])


def cond(x, t):
    return x.sin() + 1


def uncond(x, t):
    return x.cos()


def never(x, t):
    raise AssertionError("must not be evaluated")


class Model:
    """Two estimates as a model gives them; the batch is of no interest."""

    def __init__(self, cond, uncond):
        self.pair = cond, uncond

    def cond(self, batch):
        return self.pair[0]

    def uncond(self, batch):
        return self.pair[1]

    def cond_and_uncond(self, batch):
        return lambda x, t: tuple(f(x, t) for f in self.pair)


def guide(guidance, cond, uncond):
    return guidance(Model(cond, uncond), {})


def test_scale_one_and_unguided_never_call_the_unconditional_model():
    for guidance in (ClassifierFree(1.0), Rescaled(1.0), Unguided()):
        assert torch.equal(guide(guidance, cond, never)(X_T, T), cond(X_T, T))


def test_scale_zero_never_calls_the_conditional_model():
    assert torch.equal(guide(ClassifierFree(0.0), never, uncond)(X_T, T), uncond(X_T, T))


@pytest.mark.parametrize("scale", [0.5, 1.5, 7.5])
def test_the_combination_is_the_same_in_noise_velocity_and_x0(scale):
    alpha, sigma = (table[T].view(-1, 1, 1, 1) for table in (Linear().alpha, Linear().sigma))
    guided = guide(ClassifierFree(scale), cond, uncond)(X_T, T)
    eps_c, eps_u = (noise_of(f(X_T, T), X_T, alpha, sigma) for f in (cond, uncond))
    # Ho & Salimans 2022, Eq. 6: (1 + w) eps_c - w eps_u.
    eps = scale * eps_c - (scale - 1) * eps_u
    assert torch.allclose(Epsilon().x0(eps, X_T, alpha, sigma), guided, atol=1e-10)
    v_c, v_u = (Velocity().target(f(X_T, T), e, alpha, sigma) for f, e in ((cond, eps_c), (uncond, eps_u)))
    assert torch.allclose(Velocity().x0(v_u + scale * (v_c - v_u), X_T, alpha, sigma), guided, atol=1e-10)


def test_clamped_keeps_the_range_after_guidance():
    guided = guide(ClassifierFree(7.5), cond, uncond)
    assert guided(X_T, T).abs().max() > 1
    assert torch.equal(clamped(guided)(X_T, T), guided(X_T, T).clamp(-1, 1))
    assert clamped(guided, low=0.0, high=0.5)(X_T, T).min() == 0


@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_rescaled_restores_the_deviation_of_the_conditional_estimate(scale):
    def deviation(x):
        return x.flatten(1).std(1)

    plain = guide(ClassifierFree(scale), cond, uncond)(X_T, T)
    rescaled = guide(Rescaled(scale, rescale=1.0), cond, uncond)(X_T, T)
    assert torch.allclose(deviation(rescaled), deviation(cond(X_T, T)))
    assert torch.allclose(guide(Rescaled(scale, rescale=0.0), cond, uncond)(X_T, T), plain)
    # nothing to restore where the standard deviation is zero
    flat = guide(Rescaled(scale), lambda x, t: torch.ones_like(x), lambda x, t: torch.zeros_like(x))(X_T, T)
    assert torch.equal(flat, torch.full_like(X_T, scale))
    # Eq. 16: a share of the one, the rest of the other
    mixed = guide(Rescaled(scale, rescale=0.7), cond, uncond)(X_T, T)
    assert torch.allclose(mixed, 0.7 * rescaled + 0.3 * plain)


def test_an_interval_guides_inside_and_calls_one_model_outside():
    guidance = Interval(ClassifierFree(3.0), low=100, high=700)
    guided = guide(ClassifierFree(3.0), cond, uncond)
    for t in (100, 400, 700):
        times = torch.tensor([t, t])
        assert torch.equal(guide(guidance, cond, uncond)(X_T, times), guided(X_T, times))
    for t in (0, 99, 701, 999):
        assert torch.equal(guide(guidance, cond, never)(X_T, torch.tensor([t, t])), cond(X_T, t))
    assert torch.equal(
        guide(guidance, cond, uncond)(X_T, T), torch.stack([cond(X_T, T)[0], guided(X_T, T)[1]])
    )


def test_extrapolated_goes_from_the_weaker_through_the_stronger():
    assert torch.allclose(extrapolated(uncond, cond, 1.0)(X_T, T), cond(X_T, T))
    found = extrapolated(uncond, cond, 2.0)(X_T, T)
    assert torch.allclose(found - cond(X_T, T), cond(X_T, T) - uncond(X_T, T))


def test_inpainted_knows_what_the_mask_leaves():
    known, mask = torch.zeros_like(X_T), (torch.arange(4) < 2).double().view(1, 1, 1, 4)
    found = inpainted(cond, known, mask)(X_T, T)
    assert torch.equal(found[..., :2], cond(X_T, T)[..., :2]) and (found[..., 2:] == 0).all()


def test_bad_settings_are_refused_by_name():
    with pytest.raises(ValueError, match=r"guidance\.rescale must be in \[0, 1\], got 1.5"):
        Rescaled(3.0, rescale=1.5)
    with pytest.raises(ValueError, match=r"guidance\.low must be at most guidance\.high, got 9 and 3"):
        Interval(Unguided(), low=9, high=3)


@pytest.mark.parametrize(
    "guidance",
    [
        Unguided(),
        *(kind(scale) for kind in (ClassifierFree, Rescaled) for scale in (0.0, 1.0, 3.0)),
        *(Interval(ClassifierFree(scale), 0, 999) for scale in (1.0, 3.0)),
    ],
)
def test_a_guidance_knows_whether_it_uses_the_unconditional_estimate(guidance):
    evaluated = []
    model = Model(cond, lambda x, t: evaluated.append(t) or x.cos())
    guidance(model, {})(X_T, T)
    assert guidance.uses_uncond == bool(evaluated)


def test_a_negative_prompt_is_what_the_guidance_inside_is_led_away_from():
    class Model:
        def cond_and_uncond(self, batch):
            return lambda x, t: (
                x,
                torch.stack([torch.full_like(x[0], len(n)) for n in batch["negative_text"]]),
            )

    batch = {"key": ["a", "b", "c"], "text": ["", "", ""]}
    x_t, t = torch.zeros(3, 1, 2, 2), torch.zeros(3)
    guidance = NegativePrompt("four", ClassifierFree(2.0))
    assert guidance(Model(), batch)(x_t, t)[:, 0, 0, 0].tolist() == [-4, -4, -4]
    own = {**batch, "negative_text": ["", "x", "yy"]}
    assert guidance(Model(), own)(x_t, t)[:, 0, 0, 0].tolist() == [0, -1, -2]
    assert "negative_text" not in batch and guidance.uses_uncond
    with pytest.raises(ValueError, match="Unguided does not use a negative prompt, expected such as"):
        NegativePrompt("x", Unguided())
    with pytest.raises(ValueError, match="NegativePrompt guides a model that is not conditioned on captions"):
        guidance(Model(), {"key": ["a"]})

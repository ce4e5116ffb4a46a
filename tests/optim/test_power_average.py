"""Power-function averages against their closed forms, by which any length is made of two."""

import numpy as np
import pytest

from ldm.optim.power_average import LONGEST, Profile, decay, exponent, reconstruction


def weights(profile, steps):
    """How much each step counts: the integral of the profile over it."""
    ends = np.minimum(np.arange(steps + 1) / profile.time, 1.0)
    return np.diff(ends ** (profile.gamma + 1.0))


def stored(steps, count, lengths=(0.05, 0.10)):
    return [Profile(s, steps * i // count) for i in range(1, count + 1) for s in lengths]


@pytest.mark.parametrize("sigma_rel", [0.001, 0.05, 0.07, 0.1, 0.25, 0.288])
def test_exponent_inverts_the_standard_deviation_of_the_profile(sigma_rel):
    gamma = exponent(sigma_rel)
    # moments of (gamma + 1) t^gamma on [0, 1]
    mean, square = (gamma + 1) / (gamma + 2), (gamma + 1) / (gamma + 3)
    assert (square - mean**2) ** 0.5 == pytest.approx(sigma_rel, rel=1e-9)
    assert gamma >= 0


def test_published_exponents():
    assert [round(exponent(s), 2) for s in (0.05, 0.10)] == [16.97, 6.94]  # section 3 of the paper


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, LONGEST, 0.3])
def test_a_length_that_no_profile_has_is_refused(sigma_rel):
    with pytest.raises(ValueError, match=r"sigma_rel: got .*, expected a length in \(0, 0.288\]"):
        exponent(sigma_rel)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.2])
def test_decays_step_by_step_give_the_profile(sigma_rel):
    profile, tracked = Profile(sigma_rel, 300), np.zeros(300)
    for k in range(1, 301):
        d = decay(profile.gamma, k)
        tracked = d * tracked + (1 - d) * (np.arange(300) == k - 1)
    np.testing.assert_allclose(tracked, weights(profile, 300), rtol=1e-10, atol=1e-14)
    assert tracked.sum() == pytest.approx(1.0)


def test_products_are_those_of_finely_sampled_profiles():
    steps = 400_000
    found = reconstruction([Profile(0.05, steps // 2), Profile(0.2, steps)], Profile(0.1, steps))[0]
    a, b, wanted = (
        weights(p, steps) for p in (Profile(0.05, steps // 2), Profile(0.2, steps), Profile(0.1, steps))
    )
    least, *_ = np.linalg.lstsq(np.stack([a, b], 1), wanted)
    np.testing.assert_allclose(found, least / least.sum(), rtol=1e-5)


def test_what_was_stored_is_returned():
    parts, deviation = reconstruction(stored(1000, 10), Profile(0.10, 600))
    expected = np.zeros(20)
    expected[11] = 1.0
    np.testing.assert_allclose(parts, expected, atol=1e-10)
    assert deviation < 1e-6


@pytest.mark.parametrize("sigma_rel", [0.04, 0.06, 0.07, 0.085, 0.12, 0.15])
def test_another_length_is_within_a_percent_of_the_profile_that_is_tracked(sigma_rel):
    steps, wanted = 16_000, Profile(sigma_rel, 16_000)
    parts, deviation = reconstruction(stored(steps, 16), wanted)
    made = sum(part * weights(each, steps) for part, each in zip(parts, stored(steps, 16), strict=True))
    tracked = weights(wanted, steps)
    relative = np.linalg.norm(made - tracked) / np.linalg.norm(tracked)
    assert relative == pytest.approx(deviation, rel=0.05)
    assert relative < 0.0105  # 1.0 % for .04, 0.2 % to 0.9 % for the others
    assert made.sum() == pytest.approx(1.0, rel=1e-12)


def test_more_snapshots_are_closer():
    deviations = [reconstruction(stored(32_000, n), Profile(0.07, 32_000))[1] for n in (8, 16, 32)]
    assert deviations[0] > 3 * deviations[1] > 9 * deviations[2]


def test_numbers_of_the_published_program():
    # solve_posthoc_coefficients of NVlabs/edm2 for snapshots at 4096 i, i = 1 .. 8, of .05 and .10
    parts, _ = reconstruction(stored(8 * 4096, 8), Profile(0.07, 8 * 4096))
    np.testing.assert_allclose(
        parts[-3:], [-0.10864094680857854, 0.38708213040015665, 0.6931274147701691], rtol=1e-7
    )

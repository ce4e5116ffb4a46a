"""The timesteps of a trajectory, and the levels there."""

from itertools import pairwise

import pytest

from ldm.diffusion.samplers.ddim import DDIM
from ldm.diffusion.samplers.ddpm import DDPM
from ldm.diffusion.samplers.heun import Heun
from ldm.diffusion.samplers.spacing import Karras, Leading, Linspace, Trailing, trajectory
from ldm.diffusion.schedule import Cosine, Linear, RectifiedFlow, ScaledLinear


@pytest.mark.parametrize("num_steps", [1, 2, 7, 20, 50, 333, 999, 1000])
def test_steps_run_from_the_noisiest_timestep_to_clean(num_steps):
    schedule = Linear()
    taken = trajectory(schedule, Trailing(), num_steps)
    times = [step.t for step in taken]
    assert len(taken) == num_steps and times[0] == 999 and len(set(times)) == num_steps
    assert all(later < earlier for earlier, later in pairwise(times))
    gaps = [earlier - later for earlier, later in zip(times, [*times[1:], -1], strict=True)]
    assert max(gaps) - min(gaps) <= 1
    assert (taken[-1].next_alpha, taken[-1].next_sigma) == (1.0, 0.0)
    for step, after in pairwise(taken):
        assert (step.next_alpha, step.next_sigma) == (after.alpha, after.sigma)
        assert step.alpha == schedule.alpha[step.t].item()


def test_no_number_visits_all():
    assert [step.t for step in DDPM().steps(Linear(10, 0.01, 0.5))] == list(range(9, -1, -1))


@pytest.mark.parametrize("num_steps", [0, -1, 1001])
def test_an_impossible_number_of_steps_is_refused(num_steps):
    with pytest.raises(ValueError, match=rf"sampler.num_steps must be in \[1, 1000\].*got {num_steps}"):
        trajectory(Linear(), Trailing(), num_steps)


@pytest.mark.parametrize("spacing", [Leading(0), Leading(1), Linspace(), Karras()])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 50, 333, 999, 1000])
def test_a_spacing_falls_and_stays_within_the_schedule(spacing, num_steps):
    taken = DDIM(num_steps, spacing=spacing).steps(ScaledLinear())
    times = [step.t for step in taken]
    assert len(taken) == num_steps and times[-1] >= 0 and times[0] <= 999
    assert all(later < earlier for earlier, later in pairwise(times))
    assert (taken[-1].next_alpha, taken[-1].next_sigma) == (1.0, 0.0)


@pytest.mark.parametrize("offset", [1, 30])
def test_an_offset_shrinks_rather_than_leave_the_schedule(offset):
    """At 1000 of 1000 steps there is no room for any: each timestep is visited once."""
    spacing = Leading(offset)
    assert [step.t for step in DDIM(1000, spacing=spacing).steps(Linear())] == list(range(999, -1, -1))
    times = [step.t for step in DDIM(50, spacing=spacing).steps(Linear())]
    assert times == [i * 20 + min(offset, 19) for i in range(49, -1, -1)]


@pytest.mark.parametrize("spacing", [Trailing(), Leading(), Linspace(), Karras()])
@pytest.mark.parametrize("schedule", [Linear(1, 0.5, 0.5), Linear(2, 0.1, 0.9), Cosine(3)])
def test_short_schedules_are_sampled_in_full(spacing, schedule):
    times = [step.t for step in DDIM(schedule.num_steps, spacing=spacing).steps(schedule)]
    assert times[0] == schedule.num_steps - 1 and len(set(times)) == schedule.num_steps
    assert [step.t for step in DDIM(1, spacing=Karras()).steps(schedule)] == [schedule.num_steps - 1]


def test_an_offset_below_zero_is_refused():
    with pytest.raises(ValueError, match=r"sampler\.spacing\.offset must be >= 0, got -1"):
        Leading(-1)


def test_the_levels_of_karras_are_eq_5():
    levels = [step.noise_level ** (1 / 7) for step in Heun(20, Karras()).steps(Linear())]
    gaps = [earlier - later for earlier, later in pairwise(levels)]
    assert gaps == pytest.approx([gaps[0]] * 19, rel=1e-6)
    assert (levels[0] ** 7, levels[-1] ** 7) == pytest.approx(Linear().noise_level[[-1, 0]].tolist())


def test_karras_needs_a_largest_level():
    with pytest.raises(
        ValueError, match=r"sampler\.spacing: Karras .* RectifiedFlow ends in pure noise.*Trailing"
    ):
        Heun(20, Karras()).steps(RectifiedFlow())

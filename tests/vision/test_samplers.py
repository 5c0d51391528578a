"""Samplers where the answer is known: data that is Gaussian has an exact denoiser and an exact end."""

import itertools

import pytest
import torch

from lmkit.errors import BadInput
from lmkit.vision.diffusion import clean_and_noise, make_schedule
from lmkit.vision.samplers import levels, sample

MEAN, DEVIATION = 0.7, 0.3
SCHEDULES = ["linear", "cosine", "straight"]


def exact(schedule):
    """The mean of the image, and of the noise, given x: what a perfect network says where x_0 ~ N(0.7, 0.3^2)."""

    def denoise(x, level):
        alpha, sigma = schedule.at(level)
        kept = alpha * DEVIATION**2 / (alpha**2 * DEVIATION**2 + sigma**2)
        clean = MEAN + kept * (x - alpha * MEAN)
        return clean, (x - alpha * clean) / sigma

    return denoise


def destination(schedule, start):
    """Where the differential equation takes x from the noisiest level: the place within the distribution is kept."""
    alpha, sigma = schedule.at(len(schedule) - 1)
    place = (start - alpha * MEAN) / (alpha**2 * DEVIATION**2 + sigma**2) ** 0.5
    return MEAN + DEVIATION * place


def end(schedule, sampler, num_steps, start, draw=None):
    stops = levels(schedule, sampler, num_steps)
    *_, last = sample(exact(schedule), schedule, start, stops, sampler, draw)
    return last


def error(schedule, sampler, num_steps):
    start = torch.tensor([1.5], dtype=torch.float64)
    return (end(schedule, sampler, num_steps, start) - destination(schedule, start)).abs().item()


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("ddim", 1), ("heun", 2)])
def test_half_the_step_is_half_or_a_quarter_of_the_error(name, sampler, order):
    """Levels are so many that rounding the stops to them does not matter."""
    schedule = make_schedule(name, 20_000)
    errors = [error(schedule, sampler, steps) for steps in (40, 80, 160)]
    found = [torch.log2(torch.tensor(a / b)).item() for a, b in itertools.pairwise(errors)]
    assert found == pytest.approx([order, order], abs=0.25)
    assert errors[-1] < 0.02


@pytest.mark.parametrize("name", SCHEDULES)
def test_ddpm_ends_with_the_distribution_of_the_data(name):
    schedule, generator = make_schedule(name), torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(10_000, generator=generator, dtype=torch.float64)  # noqa: E731
    drawn = end(schedule, "ddpm", 1000, draw(), draw)
    assert drawn.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert drawn.std().item() == pytest.approx(DEVIATION, rel=0.03)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_equation_ends_with_it_too(name):
    start = torch.randn(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = end(make_schedule(name), "heun", 100, start)
    assert drawn.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert drawn.std().item() == pytest.approx(DEVIATION, rel=0.03)


def test_heun_asks_twice_a_step_but_for_the_last():
    schedule, asked = make_schedule("straight"), []

    def denoise(x, level):
        asked.append(level)
        return exact(schedule)(x, level)

    list(sample(denoise, schedule, torch.zeros(1), [999, 499], "heun", None))
    assert asked == [999, 499, 499]


def test_stops_by_hand():
    linear, straight = make_schedule("linear"), make_schedule("straight")
    assert levels(linear, "ddpm", 1000) == list(range(999, -1, -1))
    assert levels(straight, "heun", 5) == levels(straight, "ddim", 5) == [999, 799, 599, 399, 199]
    ratio = linear.sigmas / (linear.alphas + linear.sigmas)
    stops = ratio[levels(linear, "euler", 10)]
    torch.testing.assert_close(stops, ratio[-1] * (1 - torch.arange(10, dtype=torch.float64) / 10), atol=4e-3, rtol=0)
    for number in (0, 1001):
        with pytest.raises(BadInput, match=f"num_inference_steps is {number}; wanted 1 to 1000"):
            levels(linear, "ddim", number)


# ------------------------------------------------------------------------------------------- diffusers' own schedulers


def network(x, level):
    """Any function of x and level will do."""
    return torch.tanh(x) * (0.3 + level / 2000)


def ours(schedule, objective, stops, sampler, x, draw=None):
    def denoise(x, level):
        return clean_and_noise(network(x, level), x, *schedule.at(level), objective)

    *_, last = sample(denoise, schedule, x, stops, sampler, draw)
    return last


def start(seed=3):
    return torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["DDIMScheduler", "DDPMScheduler"])
@pytest.mark.parametrize(("objective", "prediction_type"), [("eps", "epsilon"), ("v", "v_prediction")])
def test_ddim_and_ddpm_are_those_of_diffusers(kind, objective, prediction_type):
    schedulers = pytest.importorskip("diffusers", reason="the vision extra is not installed")
    options = {"prediction_type": prediction_type, "clip_sample": False, "timestep_spacing": "trailing"}
    theirs, schedule, x = getattr(schedulers, kind)(**options), make_schedule("linear"), start()
    theirs.set_timesteps(20)
    sampler = "ddim" if kind == "DDIMScheduler" else "ddpm"
    stops, expected = levels(schedule, sampler, 20), x
    assert theirs.timesteps.tolist() == stops
    generator = torch.Generator().manual_seed(7)
    for level in stops:
        expected = theirs.step(network(expected, level), level, expected, generator=generator).prev_sample
    generator.manual_seed(7)
    draw = lambda: torch.randn(x.shape, generator=generator)  # noqa: E731
    torch.testing.assert_close(ours(schedule, objective, stops, sampler, x, draw), expected, atol=2e-4, rtol=1e-3)


def test_euler_is_that_of_diffusers_on_the_straight_way():
    schedulers = pytest.importorskip("diffusers", reason="the vision extra is not installed")
    theirs, schedule, x = schedulers.FlowMatchEulerDiscreteScheduler(), make_schedule("straight"), start()
    stops, expected = levels(schedule, "euler", 8), x
    theirs.set_timesteps(sigmas=[schedule.at(level)[1] for level in stops])
    for level, timestep in zip(stops, theirs.timesteps):
        assert timestep.item() == level + schedule.first_timestep
        expected = theirs.step(network(expected, level), timestep, expected).prev_sample
    torch.testing.assert_close(ours(schedule, "flow", stops, "euler", x), expected, atol=1e-5, rtol=1e-5)


def test_heun_is_that_of_diffusers_on_the_straight_way():
    schedulers = pytest.importorskip("diffusers", reason="the vision extra is not installed")
    theirs, schedule, x = schedulers.FlowMatchHeunDiscreteScheduler(), make_schedule("straight"), start()
    theirs.set_timesteps(4)  # sigmas 1, 0.667, 0.334, 0.001, of which each but the first is asked twice
    told = [round(t) - schedule.first_timestep for t in theirs.timesteps.tolist()]
    stops, expected = sorted(set(told), reverse=True), x
    for timestep, level in zip(theirs.timesteps, told):
        expected = theirs.step(network(expected, level), timestep, expected).prev_sample
    torch.testing.assert_close(ours(schedule, "flow", stops, "heun", x), expected, atol=1e-5, rtol=1e-4)


def test_a_step_of_ddim_is_a_step_of_euler():
    schedule, x = make_schedule("linear"), start()
    stops = [999, 600, 300, 50]
    first, second = (ours(schedule, "eps", stops, sampler, x) for sampler in ("ddim", "euler"))
    torch.testing.assert_close(first, second)
    alpha, sigma = schedule.at(999)
    clean, noise = clean_and_noise(network(x, 999), x, alpha, sigma, "eps")
    (found, *_), (alpha_to, sigma_to) = (
        sample(lambda *_: (clean, noise), schedule, x, [999, 600], "ddim", None),
        schedule.at(600),
    )
    torch.testing.assert_close(found, alpha_to * clean + sigma_to * noise, atol=1e-5, rtol=1e-4)

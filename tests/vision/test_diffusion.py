"""The noising of images and the way back: numbers by hand, diffusers' schedulers, and what must hold of any of them."""

import pytest
import torch

from lmkit.vision.diffusion import add_noise, clean_and_noise, guided, make_schedule, posterior, target

GENERATOR = torch.Generator().manual_seed(0)
CLEAN, NOISE = (torch.randn(4, 1, 3, 3, generator=GENERATOR, dtype=torch.float64) for _ in range(2))
SETTINGS = [(name, objective) for name in ("linear", "cosine") for objective in ("eps", "v")] + [("straight", "flow")]


def test_kept_signal_is_that_of_the_references():
    """alpha^2 at levels 0, 249, 499, 749, 999: the product of 1 - beta falls, where betas rise."""
    places = [0, 249, 499, 749, 999]
    linear = (make_schedule("linear").alphas[places] ** 2).tolist()
    cosine = (make_schedule("cosine").alphas[places] ** 2).tolist()
    assert linear == pytest.approx([0.9999, 0.524085, 0.0785872, 0.00335055, 4.03583e-5], rel=1e-5)
    assert cosine == pytest.approx([0.999959, 0.847012, 0.493843, 0.144272, 2.43e-9], rel=2e-3)


def test_a_noised_number_by_hand():
    schedule = make_schedule("linear")
    assert add_noise(1.0, 0.5, *schedule.at(499)) == pytest.approx(0.760285, abs=1e-6)
    assert add_noise(1.0, 0.5, *make_schedule("straight").at(249)) == 0.75 + 0.25 * 0.5
    assert schedule.at(None) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("objective", "expected"),
    [("eps", 0.5), ("v", 0.6 * 0.5 - 0.8 * 2.0), ("flow", 0.5 - 2.0)],
)
def test_targets_by_hand(objective, expected):
    """Image 2, noise 0.5, alpha 0.6, sigma 0.8: x is 1.6, and every prediction gives 2 and 0.5 back."""
    assert target(2.0, 0.5, 0.6, 0.8, objective) == pytest.approx(expected)
    assert clean_and_noise(expected, 1.6, 0.6, 0.8, objective) == pytest.approx((2.0, 0.5))


@pytest.mark.parametrize(("name", "objective"), SETTINGS)
def test_image_and_noise_come_back_at_every_level(name, objective):
    schedule = make_schedule(name)
    for level in (0, 1, 500, 998, 999):
        alpha, sigma = schedule.at(level)
        x = add_noise(CLEAN, NOISE, alpha, sigma)
        clean, noise = clean_and_noise(target(CLEAN, NOISE, alpha, sigma, objective), x, alpha, sigma, objective)
        torch.testing.assert_close(noise, NOISE, atol=1e-8, rtol=0)
        torch.testing.assert_close(clean, CLEAN, atol=1e-6, rtol=0)


def test_predictions_convert_into_each_other():
    """The v of an eps, back to eps: what a network of one objective means under another."""
    alpha, sigma = make_schedule("cosine").at(300)
    x = add_noise(CLEAN, NOISE, alpha, sigma)
    for first in ("eps", "v", "flow"):
        for second in ("eps", "v", "flow"):
            prediction = target(CLEAN, NOISE, alpha, sigma, first) + 0.1  # not perfect
            meant = clean_and_noise(prediction, x, alpha, sigma, first)
            again = clean_and_noise(target(*meant, alpha, sigma, second), x, alpha, sigma, second)
            torch.testing.assert_close(again, meant)


def test_mixed_predictions_mean_mixed_images():
    alpha, sigma = make_schedule("linear").at(700)
    for objective in ("eps", "v", "flow"):
        mixed = clean_and_noise(guided(CLEAN, NOISE, 2.5), CLEAN, alpha, sigma, objective)[0]
        apart = [clean_and_noise(p, CLEAN, alpha, sigma, objective)[0] for p in (CLEAN, NOISE)]
        torch.testing.assert_close(mixed, guided(*apart, 2.5))
    assert torch.equal(guided(CLEAN, NOISE, 0.0), CLEAN)
    torch.testing.assert_close(guided(CLEAN, NOISE, 1.0), NOISE)


@pytest.mark.parametrize("name", ["linear", "cosine", "straight"])
def test_the_posterior_puts_the_way_there_together_again(name):
    """x_s from q(x_s | x_0), or from q(x_s | x_t, x_0) with x_t from q(x_t | x_0): the same mean and variance."""
    schedule = make_schedule(name)
    for at, to in ((999, 500), (500, 499), (3, 0)):
        (alpha, sigma), (alpha_to, sigma_to) = schedule.at(at), schedule.at(to)
        mean, variance = posterior(CLEAN, alpha * CLEAN, (alpha, sigma), (alpha_to, sigma_to))
        torch.testing.assert_close(mean, alpha_to * CLEAN)
        slope = posterior(0.0, 1.0, (alpha, sigma), (alpha_to, sigma_to))[0]
        assert slope**2 * sigma**2 + variance == pytest.approx(sigma_to**2)
    assert posterior(CLEAN, NOISE, schedule.at(0), schedule.at(None))[1] == 0


@pytest.mark.parametrize(("name", "beta_schedule"), [("linear", "linear"), ("cosine", "squaredcos_cap_v2")])
@pytest.mark.parametrize(("objective", "prediction_type"), [("eps", "epsilon"), ("v", "v_prediction")])
def test_diffusers_has_the_same_process(name, beta_schedule, objective, prediction_type):
    schedulers = pytest.importorskip("diffusers", reason="the vision extra is not installed")
    options = {"beta_schedule": beta_schedule, "prediction_type": prediction_type, "clip_sample": False}
    theirs, schedule = schedulers.DDPMScheduler(**options), make_schedule(name)
    torch.testing.assert_close(schedule.alphas**2, theirs.alphas_cumprod.double(), atol=1e-6, rtol=1e-4)
    clean, noise = CLEAN.float(), NOISE.float()
    for level in (1, 400, 990):
        at = torch.full((4,), level)
        x = add_noise(clean, noise, *schedule.at(level))
        torch.testing.assert_close(x, theirs.add_noise(clean, noise, at), atol=1e-5, rtol=0)
        wanted = target(clean, noise, *schedule.at(level), objective)
        if objective == "v":
            torch.testing.assert_close(wanted, theirs.get_velocity(clean, noise, at), atol=1e-5, rtol=0)
        step = theirs.step(wanted, level, x, generator=torch.Generator().manual_seed(5))
        torch.testing.assert_close(step.pred_original_sample, clean, atol=1e-2 if level == 990 else 1e-4, rtol=0)
        mean, variance = posterior(step.pred_original_sample, x, schedule.at(level), schedule.at(level - 1))
        drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
        torch.testing.assert_close(mean + variance**0.5 * drawn, step.prev_sample, atol=2e-5, rtol=1e-4)


def test_diffusers_has_the_same_straight_way():
    schedulers = pytest.importorskip("diffusers", reason="the vision extra is not installed")
    theirs, schedule = schedulers.FlowMatchEulerDiscreteScheduler(), make_schedule("straight")
    torch.testing.assert_close(schedule.sigmas.flip(0).float(), theirs.sigmas)
    told = torch.arange(len(schedule)).flip(0) + schedule.first_timestep
    torch.testing.assert_close(told.float(), theirs.timesteps)
    x = add_noise(CLEAN.float(), NOISE.float(), *schedule.at(299))
    torch.testing.assert_close(x, theirs.scale_noise(CLEAN.float(), torch.full((4,), 300.0), NOISE.float()))

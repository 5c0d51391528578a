"""The depth dial gives nanochat's numbers where it was measured, and leaves alone what a person set."""

import pytest

from lmkit.config import validate
from lmkit.models.presets import ModelConfig
from lmkit.training.dial import by_depth
from lmkit.training.options import TrainConfig


def test_depth_twelve_is_the_reference():
    train = by_depth(TrainConfig(), ModelConfig(depth=12), 32768, 1)
    weights = 12 * 768 * (4 * 768 + 3 * 2048) + 32768 * 768
    assert train.global_batch_size == 2**19 // 2048
    assert train.max_steps == round(12 * weights / 2**19)
    assert train.learning_rate == pytest.approx(0.1 / 768**0.5, rel=1e-2)


def test_batch_grows_and_rate_falls_with_depth():
    trains = [by_depth(TrainConfig(), ModelConfig(depth=depth), 32768, 1) for depth in (4, 12, 26)]
    assert [t.global_batch_size * 2048 for t in trains] == [2**18, 2**19, 2**20]
    assert trains[0].max_steps < trains[1].max_steps < trains[2].max_steps


def test_processes_share_the_batch():
    for processes in (1, 2, 8):
        train = by_depth(TrainConfig(per_device_train_batch_size=64), ModelConfig(depth=12), 32768, processes)
        assert train.accumulation(processes) * train.per_device_train_batch_size * processes == 256
    assert by_depth(TrainConfig(), ModelConfig(depth=12), 32768, 64).per_device_train_batch_size == 4


def test_what_was_set_stays():
    train = TrainConfig(learning_rate=1e-3, max_steps=77, global_batch_size=64)
    found = by_depth(train, ModelConfig(depth=12), 32768, 1)
    assert (found.learning_rate, found.max_steps, found.global_batch_size) == (1e-3, 77, 64)
    assert by_depth(train, ModelConfig(preset="base"), 32768, 1) is train


def test_sizes_are_multiples_of_128_and_given_ones_replace_them():
    for depth in range(1, 40):
        sizes = ModelConfig(depth=depth).sizes()
        assert sizes["num_hidden_layers"] == depth
        assert not any(sizes[name] % 128 for name in ("hidden_size", "intermediate_size", "head_dim"))
    assert validate(ModelConfig, {"depth": 8, "context_length": 512}).sizes()["context_length"] == 512

import numpy as np
import pytest

from lmkit.data.order import batch_positions, shuffled


@pytest.mark.parametrize("num_samples", [1, 2, 3, 4, 5, 64, 65, 1000])
def test_every_epoch_reads_every_sample_once(num_samples):
    for epoch in range(3):
        positions = np.arange(num_samples) + epoch * num_samples
        assert sorted(shuffled(positions, num_samples, seed=3)) == list(range(num_samples))


def test_epochs_and_seeds_have_orders_of_their_own():
    first = shuffled(np.arange(1000), 1000, seed=0)
    assert (first != shuffled(np.arange(1000, 2000), 1000, seed=0)).mean() > 0.9
    assert (first != shuffled(np.arange(1000), 1000, seed=1)).mean() > 0.9


def test_the_order_is_shuffled():
    order = shuffled(np.arange(10_000), 10_000, seed=0)
    assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.05
    assert (np.abs(np.diff(order)) == 1).mean() < 0.01


def test_a_position_is_computed_alone_also_across_the_end_of_an_epoch():
    whole = shuffled(np.arange(300), 70, seed=5)
    assert [int(shuffled(np.array([p]), 70, seed=5)[0]) for p in (0, 69, 70, 141, 299)] == whole[
        [0, 69, 70, 141, 299]
    ].tolist()


def test_a_huge_corpus_needs_no_memory():
    numbers = shuffled(np.array([0, 10**11]), 10**12, seed=0)
    assert ((numbers >= 0) & (numbers < 10**12)).all()


@pytest.mark.parametrize(("size", "accumulation", "world"), [(24, 1, 1), (3, 8, 1), (12, 1, 2), (2, 4, 3), (1, 6, 4)])
def test_a_step_reads_the_same_samples_however_it_is_split(size, accumulation, world):
    read = [
        batch_positions(3, micro_batch, rank, size=size, accumulation=accumulation, world=world)
        for micro_batch in range(accumulation)
        for rank in range(world)
    ]
    assert np.concatenate(read).tolist() == list(range(72, 96))


def test_no_samples_is_an_error():
    with pytest.raises(ValueError, match="at least one sample"):
        shuffled(np.arange(3), 0, seed=0)

import threading

import pytest

from lmkit.training.prefetch import AHEAD, prefetch


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_results_come_in_the_order_of_the_items(num_workers):
    assert list(prefetch(lambda x: x * x, range(50), num_workers)) == [x * x for x in range(50)]


@pytest.mark.parametrize("num_workers", [1, 3])
def test_few_are_made_ahead_and_closing_ends_the_threads(num_workers):
    made, before = [], threading.active_count()
    results = prefetch(lambda x: made.append(x) or x, range(1000), num_workers)
    for _ in range(5):
        next(results)
    results.close()
    assert len(made) <= 5 + AHEAD * num_workers
    assert threading.active_count() == before


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_exception_is_raised_in_its_turn(num_workers):
    results = prefetch(lambda x: 1 // (3 - x), range(9), num_workers)
    assert [next(results) for _ in range(3)] == [0, 0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_the_next_is_made_while_one_is_in_use():
    second = threading.Event()
    results = prefetch(lambda x: x and second.set(), range(2), 1)
    next(results)
    assert second.wait(10)
    results.close()

"""Batches made ready in threads while the device works on the one before."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
AHEAD = 2  # results each thread makes before they are asked for: memory is bounded


def prefetch(load: Callable[[Item], Result], items: Iterable[Item], num_workers: int) -> Iterator[Result]:
    """`load(item)` for each item, in their order, computed ahead by `num_workers` threads; 0: when it is asked for.

    The number of threads cannot change a result if `load` is a function of its item alone; so it must not draw from
    torch's or NumPy's global generators. What it raises is raised here, in its turn. Close the iterator to end the
    threads early.

    >>> list(prefetch(lambda x: x * x, range(5), num_workers=2))
    [0, 1, 4, 9, 16]
    """
    if not num_workers:
        yield from map(load, items)
        return
    items = iter(items)
    with ThreadPoolExecutor(num_workers, "prefetch") as pool:
        waiting = deque(pool.submit(load, item) for item in itertools.islice(items, AHEAD * num_workers))
        try:
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(pool.submit(load, item) for item in itertools.islice(items, 1))
                yield result
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

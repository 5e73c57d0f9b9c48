"""A little work in threads: results as they come, a bounded number of items taken ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 2  # items per thread, so that none waits for the one that hands them out


def in_threads(
    work: Callable[[Item], Result], items: Iterable[Item], jobs: int
) -> Iterator[tuple[Item, Result]]:
    """Yield (item, result) in the order in which they finish.

    The first error is raised; what has not begun by then, or when the caller stops, is left.
    """
    waiting = iter(items)
    running: dict[Future[Result], Item] = {}
    executor = ThreadPoolExecutor(max(jobs, 1), thread_name_prefix="moeconv")
    try:
        while True:
            for item in islice(waiting, max(jobs, 1) * AHEAD - len(running)):
                running[executor.submit(work, item)] = item
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield running.pop(future), future.result()
    finally:
        executor.shutdown(cancel_futures=True)

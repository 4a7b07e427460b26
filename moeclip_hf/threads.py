"""Work in threads, ahead of what its results are for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def read_ahead(
    read: Callable[[Item], Result], items: Iterable[Item], depth: int, workers: int = 2
) -> Iterator[Result]:
    """
    Call `read` on items in threads, and give the results in order.

    Args:
        read: what reads one item; what it raises is raised where its result is due.
        items: what to read.
        depth: items read at most before they are asked for.
        workers: threads.
    """
    remaining = iter(items)
    with ThreadPoolExecutor(max_workers=workers, thread_name_prefix="reader") as readers:
        pending: deque[Future[Result]] = deque(readers.submit(read, item) for item in islice(remaining, depth))
        try:
            while pending:
                yield pending.popleft().result()
                pending.extend(readers.submit(read, item) for item in islice(remaining, 1))
        finally:
            for future in pending:
                future.cancel()

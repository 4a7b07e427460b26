"""Images read in threads, ahead of the model that they are for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from moeclip_hf.errors import UnreadableImageError
from moeclip_hf.modeling.image_processing_moeclip import to_rgb

if TYPE_CHECKING:
    from datasets import Dataset

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


def read_row(rows: Dataset, index: int) -> dict[str, Any]:
    """
    Read one row of a data set (`moeclip_hf.data.Record`), its image upright and in RGB, its mask as it is.

    Raises:
        UnreadableImageError: naming the image, where it or its mask cannot be read.
    """
    try:
        row = rows[index]
        return {**row, "image": to_rgb(row["image"])}
    except (OSError, SyntaxError, ValueError, MemoryError) as error:
        name = rows.select_columns(["image_path"])[index]["image_path"]
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableImageError(f"{name}: it or its mask cannot be read: {reason}") from error


__all__ = ["read_ahead", "read_row"]

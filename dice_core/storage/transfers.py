"""Work that waits for storage, side by side: several files at once, the next ones ahead of time, the last one behind.

In threads: what waits for the network or hashes leaves the interpreter to others. Knows nothing of what is moved;
storage.py does.
"""

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

from dice_core.storage.outages import waiting_ends_with_interrupt

Item = TypeVar("Item")
Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")

# A file travels in ten parts at once, and the storage's client holds forty connections.
_NUM_AT_ONCE = 4


def side_by_side(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Call the function with each item, four at a time, and return the results in the items' order.

    Raises:
        Exception: the first error. What has not begun is not begun any more; what has is waited for.
    """
    wanted = list(items)
    if len(wanted) == 1:
        # Where a Ctrl-C ends the transfer itself.
        return [function(wanted[0])]
    with ThreadPoolExecutor(_NUM_AT_ONCE) as pool:
        futures = [pool.submit(function, item) for item in wanted]
        try:
            with waiting_ends_with_interrupt():
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in filter(done.__contains__, futures):
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        return [future.result() for future in futures]


def read_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], num_ahead: int
) -> Generator[Result, None, None]:
    """Yield the function's results in the items' order, with the next few under way while the caller uses one.

    Args:
        function: called in threads.
        items: read one at a time.
        num_ahead: results that are made or waiting at most, beside the one that the caller has.
    """
    waiting, remaining = deque[Future[Result]](), iter(items)
    with ThreadPoolExecutor(num_ahead) as pool:
        try:
            waiting.extend(pool.submit(function, item) for item in itertools.islice(remaining, num_ahead))
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(pool.submit(function, item) for item in itertools.islice(remaining, 1))
                yield result
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def write_behind(function: Callable[Arguments, None]) -> Iterator[Callable[Arguments, None]]:
    """Yield a function that returns while the given one still works for it: one call is under way at most.

    A call waits for the one before and raises its error; the end of the block does so for the last. After an error in
    the block, the call under way is finished too, and the block's error is the one that is raised.
    """
    under_way = deque[Future[None]]()

    def begin(*args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        while under_way:
            under_way.popleft().result()
        under_way.append(pool.submit(function, *args, **kwargs))

    with ThreadPoolExecutor(1) as pool:
        yield begin
        while under_way:
            under_way.popleft().result()

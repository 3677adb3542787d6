"""Independent calls of a room, run by whoever knows where: one after the other in this process, or each in a task."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Each(Protocol):
    """Runs calls and gives what they return, in any order. `shared`: an argument of all of them, sent once."""

    def __call__(self, calls: Iterable[Callable[..., T]], shared: Any = None) -> Iterator[T]:
        """Raises what they raise."""
        ...


def in_turn(calls: Iterable[Callable[..., T]], shared: Any = None) -> Iterator[T]:
    """What each call returns, in this process."""
    return (call() if shared is None else call(shared) for call in calls)


AHEAD = 8
"""Calls that are begun before their result is wanted: small requests to a store far away."""


def ahead(calls: Iterable[Callable[[], T]]) -> Iterator[T]:
    """What each call returns, in their order, some of them begun early by threads."""
    with ThreadPoolExecutor(AHEAD) as pool:
        waiting: deque[Future[T]] = deque()
        for call in calls:
            waiting.append(pool.submit(call))
            if len(waiting) >= AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

"""Independent calls of a room, run by whoever knows where: one after the other in this process, or each in a task."""

import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import pyarrow as pa

T = TypeVar("T")


class Each(Protocol):
    """Runs calls and gives what they return, in any order; it may draw some from an iterator while others run.
    `shared`: an argument of all of them, sent once."""

    def __call__(self, calls: Iterable[Callable[..., T]], shared: Any = None) -> Iterator[T]:
        """Raises what they raise."""
        ...


def in_turn(calls: Iterable[Callable[..., T]], shared: Any = None) -> Iterator[T]:
    """What each call returns, in this process."""
    return (call() if shared is None else call(shared) for call in calls)


AHEAD = 8
"""Calls that are begun before their result is wanted: small requests to a store far away."""

SMALL_BYTES = 512 * 2**20
"""Of files that this process goes through itself: Ray would take longer to start."""


def ahead(calls: Iterable[Callable[[], T]], threads: int = AHEAD) -> Iterator[T]:
    """What each call returns, in their order, some of them begun early by threads."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[T]] = deque()
        for call in calls:
            waiting.append(pool.submit(call))
            if len(waiting) >= threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def in_order(calls: Iterable[Callable[[], T]], each: Each | None, threads: int) -> list[T]:
    """What each call returns, in their order, whatever ends first: by `each`, or by threads of this process."""
    if each is None:
        return list(ahead(calls, threads))
    numbered = (partial(_numbered, number, call) for number, call in enumerate(calls))
    return [result for _, result in sorted(each(numbered), key=lambda pair: pair[0])]


def _numbered(number: int, call: Callable[[], T]) -> tuple[int, T]:
    return number, call()


@dataclass(frozen=True)
class Packed:
    """A call as compressed bytes: what goes along with it, arrays of rows, becomes a third."""

    data: bytes
    size: int

    def __call__(self, *arguments: Any) -> Any:
        """Returns what the call returns, and raises what it raises."""
        return pickle.loads(pa.decompress(self.data, self.size, codec="zstd"))(*arguments)


def packs(calls: Iterable[Callable[..., T]], tasks: int, size: int) -> Iterator[list[Packed]]:
    """Calls in groups of at most so many tasks, of about so many bytes; each is drawn when its group is asked for."""
    group: list[Packed] = []
    held = 0
    for call in calls:
        data = pickle.dumps(call)
        group.append(Packed(pa.compress(data, codec="zstd", asbytes=True), len(data)))
        held += len(group[-1].data)
        if len(group) >= tasks or held >= size:
            yield group
            group, held = [], 0
    if group:
        yield group

"""Independent calls of a room, run by whoever knows where: one after the other in this process, or each in a task."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

T = TypeVar("T")


class Each(Protocol):
    """Runs calls and gives what they return, in any order."""

    def __call__(self, calls: Sequence[Callable[[], T]]) -> Iterator[T]:
        """Raises what they raise."""
        ...


def in_turn(calls: Sequence[Callable[[], T]]) -> Iterator[T]:
    """What each call returns, in this process."""
    return (call() for call in calls)

"""Who is next: clients take turns, each one's own requests in their order. Takes no locks."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """A client with many requests waits behind one with few."""

    def __init__(self) -> None:
        self._lines: OrderedDict[Hashable, deque[T]] = OrderedDict()  # who is next is first

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def put(self, client: Hashable, item: T) -> None:
        self._lines.setdefault(client, deque()).append(item)

    def take(self) -> T:
        """The next one; its client goes to the end of the row. Raises IndexError if none waits."""
        if not self._lines:
            raise IndexError("the queue is empty")
        client, line = self._lines.popitem(last=False)
        item = line.popleft()
        if line:
            self._lines[client] = line
        return item

    def remove(self, item: T) -> bool:
        """Whether it was waiting; it is no more."""
        for client, line in self._lines.items():
            if item in line:
                line.remove(item)
                if not line:
                    del self._lines[client]
                return True
        return False

    def drain(self) -> list[T]:
        """All that wait; nobody does any more."""
        items = [item for line in self._lines.values() for item in line]
        self._lines.clear()
        return items

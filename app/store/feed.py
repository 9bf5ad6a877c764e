"""What was just committed, brought from the store's thread to whoever follows on an event loop."""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

# About half a minute of everything that 64 calls say.
BACKLOG = 5_000

HELLO = "hello"


@dataclass(frozen=True, slots=True)
class Change:
    """A change that is in the database.

    `event_id` is the stored event's id, None where the change is not kept as one (`hello`, `transcript.updated`).
    `hello` says: nothing is missed from here on, read afresh what you show. It comes first, and again whenever
    the follower was too slow.
    """

    type: str
    call_id: str = ""
    data: dict[str, Any] = field(default_factory=dict)
    event_id: int | None = None


class Subscription:
    """One follower. Iterate on the loop that subscribed; ends when the feed closes."""

    def __init__(self, loop: asyncio.AbstractEventLoop, backlog: int) -> None:
        self.loop = loop
        self._waiting: deque[Change] = deque([Change(HELLO)])
        self._backlog = backlog
        self._news = asyncio.Event()
        self._news.set()
        self._closed = False

    def deliver(self, changes: Sequence[Change]) -> None:
        """Loop only. Never grows past the backlog: a slow follower starts over instead."""
        if len(self._waiting) + len(changes) > self._backlog:
            self._waiting.clear()
            self._waiting.append(Change(HELLO))
        else:
            self._waiting.extend(changes)
        self._news.set()

    def end(self) -> None:
        self._closed = True
        self._news.set()

    async def __aiter__(self) -> AsyncIterator[Change]:
        while True:
            await self._news.wait()
            self._news.clear()
            while self._waiting and not self._closed:
                yield self._waiting.popleft()
            if self._closed:
                return


class Feed:
    """Hands every change to every follower. `publish` is called from the store's thread and never waits."""

    def __init__(self, backlog: int = BACKLOG) -> None:
        self._backlog = backlog
        self._lock = threading.Lock()
        self._subscriptions: set[Subscription] = set()
        self._closed = False

    def publish(self, changes: Sequence[Change]) -> None:
        with self._lock:
            for subscription in self._subscriptions:
                _call_soon(subscription.loop, subscription.deliver, changes)

    @contextmanager
    def subscribe(self) -> Iterator[Subscription]:
        """Follow from now on; call it on the loop that will iterate."""
        subscription = Subscription(asyncio.get_running_loop(), self._backlog)
        with self._lock:
            self._subscriptions.add(subscription)
            if self._closed:
                subscription.end()
        try:
            yield subscription
        finally:
            with self._lock:
                self._subscriptions.discard(subscription)

    @property
    def followers(self) -> int:
        return len(self._subscriptions)

    def close(self) -> None:
        """End every follower's iteration, now and from now on. From any thread, twice if need be.

        To be called before the web server waits for its connections: an open stream of events would hold it up.
        """
        with self._lock:
            self._closed = True
            for subscription in self._subscriptions:
                _call_soon(subscription.loop, subscription.end)


def _call_soon(loop: asyncio.AbstractEventLoop, what: Callable[..., None], *arguments: object) -> None:
    # A loop that was stopped with a follower on it took the follower along: there is nobody to tell.
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(what, *arguments)

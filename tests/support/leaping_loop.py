"""An event loop with a clock of its own, which leaps over the time in which nothing happens: tests
of minutes take milliseconds, and no busy machine makes them fail. For code without sockets."""

import asyncio
import functools
import selectors
from collections.abc import Callable, Coroutine
from typing import Any


class LeapingSelector(selectors.DefaultSelector):
    """Advances the clock instead of waiting."""

    now = 1000.0

    def select(self, timeout: float | None = None) -> Any:
        assert timeout is not None, "every task waits, and none is left to wake another"
        self.now += max(timeout, 0.0)
        return super().select(0)


class LeapingLoop(asyncio.SelectorEventLoop):
    """A loop whose time is that of a LeapingSelector."""

    def __init__(self) -> None:
        self._clock = LeapingSelector()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now


def now() -> float:
    """Return the time of the running loop, in seconds."""
    return asyncio.get_running_loop().time()


def leaping(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run an async test in a LeapingLoop."""

    @functools.wraps(test)
    def run(*args: Any, **fixtures: Any) -> None:
        with asyncio.Runner(loop_factory=LeapingLoop) as runner:
            runner.run(test(*args, **fixtures))

    return run

"""A clock for tests, in place of the module `time`."""

from dataclasses import dataclass


@dataclass
class StillClock:
    """It stands still, in seconds, until a test sets `now`."""

    now: float = 0.0

    def monotonic(self) -> float:
        return self.now

    def perf_counter(self) -> float:
        return self.now

"""A clock for tests, in place of the module `time`."""

from dataclasses import dataclass


@dataclass
class StillClock:
    """It stands still, in seconds, until a test sets `now`, or `computed`: the seconds for which
    the thread has had a processor."""

    now: float = 0.0
    computed: float = 0.0

    def thread_time(self) -> float:
        return self.computed

    def monotonic(self) -> float:
        return self.now

    def perf_counter(self) -> float:
        return self.now

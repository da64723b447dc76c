"""How much and how long the server takes, so that no client ends it."""

import math
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from distillery.records import LONGEST_OPTION

LARGEST_BODY = 4 << 20
"""Bytes of the largest request."""

MOST_MESSAGES = 1000
MOST_PARTS = 1000
MOST_STOPS, LONGEST_STOP = 4, 256
MOST_CHOICES, LONGEST_CHOICE = 64, LONGEST_OPTION
LONGEST_NAME = 256
LONGEST_SCHEMA = 65_536
MOST_TOKENS = 1 << 20
LARGEST_SEED = (1 << 63) - 1

MOST_BODY_BYTES = 256 << 20
"""Bytes of all bodies that are being read, and of all that wait for their answers."""

SPARE_CONNECTIONS = 256
"""Connections beside those of bodies that are being read and of requests that wait."""

ACCEPTED_AT_ONCE = 2048
"""Connections that may be accepted before the first of them is looked at."""

LONGEST_RETRY = 60
"""Seconds. The openai package follows no longer Retry-After."""


@dataclass(frozen=True)
class Limits:
    """`queue`: requests that wait or are answered; others are told to come again. `reading`: bodies
    that are being read. `connections`: those that are open, idle ones included. In seconds:
    `header_s` and `body_s`, in which a request must have come; `answer_s`, in which its answer must
    be complete, the time that it waits included, which is that after which the openai package gives
    up by itself; `drain_s`, in which those that are there are answered when the server stops.
    `batch`: texts that are generated at once. `context`: tokens that a request's messages and its
    answer may have together; None for what the model takes."""

    queue: int = 1024
    reading: int = 1024
    connections: int = 2 * 1024 + SPARE_CONNECTIONS
    header_s: float = 15.0
    body_s: float = 30.0
    answer_s: float = 600.0
    drain_s: float = 30.0
    batch: int = 16
    context: int | None = None


def for_queue(queue: int, **others: Any) -> Limits:
    """Return the limits that go with a queue, and `others` of its fields."""
    return Limits(queue, reading=queue, connections=2 * queue + SPARE_CONNECTIONS, **others)


def within_open_files(limits: Limits) -> Limits:
    """Return the limits within three quarters of the files that this process may open, each
    connection being one. A soft limit that is too low is raised as far as the hard one allows."""
    try:
        import resource
    except ImportError:  # Windows has no such limit.
        return limits
    wanted = math.ceil(limits.connections / 0.75) + ACCEPTED_AT_ONCE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        raised = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        # macOS has a lower limit than its hard one tells.
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
    connections = max(8, soft * 3 // 4)
    if soft == resource.RLIM_INFINITY or connections >= limits.connections:
        return limits
    share = connections * 3 // 8
    return replace(
        limits,
        connections=connections,
        queue=min(limits.queue, share),
        reading=min(limits.reading, share),
    )


def retry_after(waiting: int, answer_s: float) -> int:
    """Return in how many seconds `waiting` requests are answered, of which each takes `answer_s`;
    1 to LONGEST_RETRY."""
    return min(LONGEST_RETRY, max(1, math.ceil(waiting * answer_s)))

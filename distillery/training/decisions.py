"""What a training decides from the rows, with the reason: told in the log, and kept in its
record."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

_log = logging.getLogger(__name__)
_decisions: ContextVar[list[str] | None] = ContextVar("decisions", default=None)


def decide(text: str) -> None:
    """Tell a decision in the log, and keep it where `kept_decisions` is open."""
    _log.info("%s", text)
    keep_decisions([text])


def keep_decisions(texts: Sequence[str]) -> None:
    """Keep decisions, which the log has, where `kept_decisions` is open."""
    kept = _decisions.get()
    if kept is not None:
        kept.extend(texts)


@contextmanager
def kept_decisions() -> Iterator[list[str]]:
    """Give the list to which the decisions made within are added: Olive's passes return models
    alone."""
    kept: list[str] = []
    token = _decisions.set(kept)
    try:
        yield kept
    finally:
        _decisions.reset(token)

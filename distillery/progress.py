"""What long work is given to tell how far it is, so that it need not know who shows it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

ShowProgress = Callable[[int, int, str], None]
"""Is told how much is done, of how much, and in words what runs."""


def show_nothing(_done: int, _of: int, _text: str) -> None:
    """Show no progress."""


_shown_by: ContextVar[ShowProgress] = ContextVar("shown_by", default=show_nothing)


@contextmanager
def shown_by(progress: ShowProgress) -> Iterator[None]:
    """Have the probes within show their rows by `progress`: they run deep below Olive's passes,
    whose settings can't carry it."""
    token = _shown_by.set(progress)
    try:
        yield
    finally:
        _shown_by.reset(token)


def show_rows(done: int, of: int, text: str) -> None:
    """Tell how many rows are done to whom `shown_by` names; without, to nobody."""
    _shown_by.get()(done, of, text)

"""What long work is given to tell how far it is, so that it need not know who shows it."""

from collections.abc import Callable

ShowProgress = Callable[[int, int, str], None]
"""Is told how much is done, of how much, and in words what runs."""


def show_nothing(_done: int, _of: int, _text: str) -> None:
    """Show no progress."""

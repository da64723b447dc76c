"""labels/window"""

from dataclasses import dataclass

from distillery.labels.questions import Question
from distillery.labels.store import StoredAnswer
from distillery.records import Example


@dataclass(slots=True)
class RequestState:
    """What is known of a request: the stored answer, or why there is none; neither while it is under way."""

    stored: StoredAnswer | None = None
    failure: str = ""
    rows: int = 0

    @property
    def is_known(self) -> bool:
        return self.stored is not None or bool(self.failure)


@dataclass(frozen=True, slots=True)
class OpenRow:
    """A row in the window."""

    row: Example
    questions: list[Question]
    outcomes: list[RequestState]

"""The window of a labelling run: the rows whose answers are not all known yet, in order."""

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from distillery.labels.questions import Question
from distillery.labels.store import StoredAnswer
from distillery.records import Example


@dataclass(slots=True)
class RequestState:
    """What is known of a request: its answer, or why it has none; neither of them while it is
    under way. `rows` counts the open rows that wait for it. `is_new`: the answer was not known when
    the request was opened, so that it is asked."""

    stored: StoredAnswer | None = None
    failure: str = ""
    rows: int = 0
    is_new: bool = False

    @property
    def is_known(self) -> bool:
        """Whether the request is answered or has failed for good."""
        return self.stored is not None or bool(self.failure)


class OpenRow(NamedTuple):
    """A row in the window: its requests, and what is known of each of them."""

    row: Example
    questions: list[Question]
    states: list[RequestState]

    @property
    def is_complete(self) -> bool:
        """Whether all of its requests are known."""
        return all(state.is_known for state in self.states)


class Window:
    """The open rows, oldest first, and the states of their requests.

    Invariants:
    - Rows leave in the order in which they were opened, and only when they are complete.
    - Rows with equal requests share one state. It lives from the first of these rows to the last,
      and meanwhile `open` does not return the request again: no request is asked twice at a time.
    - A state changes once, from under way to known.
    """

    def __init__(self) -> None:
        self._rows: deque[OpenRow] = deque()
        self._states: dict[str, RequestState] = {}
        self.equal = 0
        """Requests that were not asked since an open row had asked the same."""

    def __len__(self) -> int:
        return len(self._rows)

    def state(self, key: str) -> RequestState:
        """Return the state of a request of an open row."""
        return self._states[key]

    def states_of(self, keys: set[str]) -> dict[str, RequestState]:
        """Return the states of those of `keys` that open rows wait for."""
        return {key: self._states[key] for key in keys & self._states.keys()}

    def open(
        self,
        row: Example,
        questions: list[Question],
        known: Mapping[str, StoredAnswer],
        under_way: Mapping[str, RequestState],
    ) -> list[Question]:
        """Add a row and return the requests that have to be asked for it.

        `known` holds stored answers. `under_way` holds states that were shared when these answers
        were looked up; their rows may have left the window since.
        """
        states, missing = [], []
        for question in questions:
            state = self._states.get(question.key, under_way.get(question.key))
            if state is None:
                state = RequestState(known.get(question.key))
                if not state.is_known:
                    state.is_new = True
                    missing.append(question)
            elif state.is_new:
                self.equal += 1
            self._states[question.key] = state
            state.rows += 1
            states.append(state)
        self._rows.append(OpenRow(row, questions, states))
        return missing

    def take_complete(self) -> Iterator[OpenRow]:
        """Remove and yield rows from the oldest on, up to the first that is not complete."""
        while self._rows and self._rows[0].is_complete:
            oldest = self._rows.popleft()
            for question, state in zip(oldest.questions, oldest.states, strict=True):
                state.rows -= 1
                if not state.rows:
                    del self._states[question.key]
            yield oldest

"""What a registry remembers of a model: each version's registration and each change of champion.

An event is a tag, whose name begins with PREFIX and whose value is the event's JSON. Events are
added and never changed. Their names sort by time.
"""

import uuid
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Literal, NamedTuple

from pydantic import ValidationError

from distillery.errors import RegistryError, one_line
from distillery.records import Record

PREFIX = "history_"

REASON_CHARACTERS = 400
"""A longer reason is cut, so that an event stays below 1,000 characters: MLflow takes 100,000 in a
tag, its releases before 2024 5,000, and Azure ML is not documented."""

Action = Literal["registered", "rejected", "promoted", "rolled back", "unpinned"]


class Actor(NamedTuple):
    """Who acts on a registry: a run by its name and Prefect's id, or a user by name."""

    name: str
    run_id: str = ""


class Event(Record):
    """An entry of a model's history.

    `at`: UTC in ISO 8601. `by`, `run_id`: see Actor. `before`: the champion that `version` took the
    place of. `pinned_above`: the newest version when `version` was made champion and pinned; runs
    promote only versions above it.
    """

    at: str
    action: Action
    version: str
    by: str
    run_id: str = ""
    reason: str = ""
    before: str | None = None
    pinned_above: str | None = None

    @property
    def line(self) -> str:
        """The event in a line for people."""
        text = f"{self.at[:19]}Z  version {self.version} {self.action}"
        if self.before:
            text += f" in place of version {self.before}"
        if self.pinned_above:
            text += ", pinned"
        text += f"  by {self.by}"
        if self.run_id:
            text += f" (run {self.run_id})"
        return f"{text}: {self.reason}" if self.reason else text


def new_event(
    history: Sequence[Event],
    action: Action,
    version: str,
    actor: Actor,
    reason: str = "",
    before: str | None = None,
    pinned_above: str | None = None,
) -> Event:
    """Return an event of now, or of just after the last one in `history` if this machine's clock is
    behind."""
    at = datetime.now(UTC)
    if history:
        at = max(at, datetime.fromisoformat(history[-1].at) + timedelta(microseconds=1))
    return Event(
        at=at.isoformat(timespec="microseconds"),
        action=action,
        version=version,
        by=actor.name,
        run_id=actor.run_id,
        reason=one_line(reason, REASON_CHARACTERS),
        before=before,
        pinned_above=pinned_above,
    )


def event_tag(event: Event) -> tuple[str, str]:
    """Return the name and the value of an event's tag. No two events have the same name."""
    stamp = event.at.translate(str.maketrans("", "", ":.-+"))
    value = event.model_dump_json(exclude_defaults=True)
    return f"{PREFIX}{stamp}_{uuid.uuid4().hex[:8]}", value


def events_in(tags: Mapping[str, str], location: str) -> list[Event]:
    """Return the events among the tags, the oldest first. Raises RegistryError for a tag that
    can't be read."""
    events = []
    for name in sorted(tags):
        if not name.startswith(PREFIX):
            continue
        try:
            events.append(Event.model_validate_json(tags[name]))
        except ValidationError as error:
            raise RegistryError(
                f"{location}: tag {name}: can't be read as an entry of the history; remove the tag"
            ) from error
    return sorted(events, key=lambda event: event.at)


def pin_of(history: Iterable[Event]) -> Event | None:
    """Return the event that pinned a champion last, or None if nothing is pinned since."""
    pin = None
    for event in history:
        if event.action == "unpinned":
            pin = None
        elif event.pinned_above:
            pin = event
    return pin


def champions_in(history: Iterable[Event]) -> list[str]:
    """Return the versions that have led to the present champion, which is the last.

    A rollback takes away all that came after the version that it went back to.
    """
    champions: list[str] = []
    for event in history:
        if event.action not in ("promoted", "rolled back"):
            continue
        # An earlier release, which writes no history, may have promoted in between.
        if event.before and event.before not in champions:
            champions.append(event.before)
        if event.action == "rolled back" and event.version in champions:
            del champions[champions.index(event.version) + 1 :]
        elif champions[-1:] != [event.version]:
            champions.append(event.version)
    return champions


def taken_down(history: Iterable[Event]) -> set[str]:
    """Return the versions in whose place a user has put another one, and that were not promoted
    since."""
    versions: set[str] = set()
    for event in history:
        if event.action in ("promoted", "rolled back"):
            versions.discard(event.version)
            if event.pinned_above and event.before:
                versions.add(event.before)
    return versions

"""Shards that a student answers in child runs: each child takes them from one list, until it is at
its end, so that none has to be started anew and all end together."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import count
from typing import Any

from prefect import get_run_logger

from distillery.errors import ModelError, StoreError
from distillery.recipe import PromptRecipe
from distillery.records import RegisteredModel, Shard, ShardAnswers, ShardedRows, digest_of
from distillery.storage.shared_list import SharedList
from tasks.children import TRIES, Child, Children, Job, work_by
from tasks.locks import shared_leases
from tasks.parent import check_parent
from tasks.progress import StageProgress
from tasks.shards import answer_shard
from tasks.stage import content_of


class ShardsJob(Job):
    """What a child does: answer shards of `rows` with a student, those that it takes from the list
    of `shared_shards`."""

    model: RegisteredModel
    prompt: PromptRecipe
    rows: ShardedRows


def shared_shards(job: ShardsJob, shards: Sequence[Shard]) -> SharedList:
    """Return the list of the numbers of shards that are to be answered, whose name is the digest of
    model, prompt and `shards`, which are all of the job's rows."""
    work = [job.model.content_id, content_of(job.prompt)]
    name = digest_of([*work, *(shard.content_id for shard in shards)])
    return SharedList(name, shared_leases().database)


def shards_taken(job: ShardsJob, shards: Sequence[Shard]) -> Iterator[Shard]:
    """Yield shards that a child takes from the list, each when the one before it is done."""
    shared = shared_shards(job, shards)
    while (number := shared.take()) is not None:
        yield shards[number]
        check_parent()


class ShardWork:
    """The shards of a job, and the answers that are known: `answers` by a shard's number. `find`
    returns the record of `answer_shard` for its arguments, or None if there is none.

    Once the list is at its end and all children have ended, shards that have no answers, such as
    one that a dead child had taken, are offered in a new list."""

    def __init__(self, job: ShardsJob, shards: Sequence[Shard], find: Callable[..., Any]) -> None:
        self.job, self.shards = job, shards
        self.answers: dict[int, ShardAnswers] = {}
        self._find = find
        self._rows = sum(shard.rows for shard in shards)
        self._left = 0
        self._has_offered = False
        # Since the last answers came: lists that were offered, and children that have ended early.
        self._offers = 0
        self._ended_early: Counter[int] = Counter()

    @cached_property
    def shared(self) -> SharedList:
        """What the children take shards from."""
        return shared_shards(self.job, self.shards)

    @property
    def units(self) -> tuple[float, float, str]:
        """See `Work`."""
        return self.rows_done, self._rows, "rows"

    @property
    def rows_done(self) -> int:
        """Rows of the shards whose answers are known."""
        return sum(self.shards[number].rows for number in self.answers)

    def key(self, number: int) -> str:
        """See `Work`: the digest of shards, model and prompt, and the child's number."""
        return f"{self.shared.name}-{number}"

    def missing(self) -> list[int]:
        """Return the shards whose answers are not known."""
        return [number for number in range(len(self.shards)) if number not in self.answers]

    def next_child(self, running: Sequence[Child]) -> int | None:
        """See `Work`."""
        if not running:
            self.look(self.missing())
            self.offer(self.missing())
        missing = self.missing()
        # If none runs, one is started even where others have taken the whole list: they may not
        # answer it.
        if len(running) >= len(missing) or (running and not self._left):
            return None
        numbers = {child.number for child in running}
        return next(number for number in count() if number not in numbers)

    def offer(self, numbers: Sequence[int]) -> None:
        """Offer shards to children. Raises ModelError where TRIES lists in a row have brought no
        answers, though no child has ended early."""
        if not numbers:
            return
        if self._has_offered:
            get_run_logger().warning(
                "not all shards that child runs have taken have answers; %d are offered again",
                len(numbers),
            )
        if self._offers == TRIES and not self._ended_early:
            raise ModelError(
                f"{len(numbers)} shards have no answers, though the child runs that took them have "
                "ended; see that DISTILLERY_STORE names the same store here and where they ran"
            )
        self.shared.offer(numbers)
        self._has_offered = True
        self._offers = min(self._offers + 1, TRIES)
        self.look_on()

    def is_for(self, child: Child) -> bool:
        """See `Work`."""
        return self._left > 0

    def look_on(self) -> None:
        """See `Work`: read the answers to shards that were taken."""
        taken, self._left = self.shared.progress()
        self.look(taken)

    def look(self, numbers: Iterable[int]) -> None:
        """Read the answers that the store has."""
        for number in numbers:
            if number not in self.answers:
                found = self._find(
                    model=self.job.model, prompt=self.job.prompt, shard=self.shards[number]
                )
                if found is not None:
                    self.answers[number] = found
                    self._offers = 0
                    self._ended_early.clear()

    def take_in(self, child: Child) -> None:
        """See `Work`. Raises ModelError for a child that has ended early, as have the TRIES - 1
        before it, and no answers came meanwhile."""
        if child.ended == "done" and not self._left:
            return
        reason = child.reason
        if child.ended == "done":
            reason = (
                "it ended though shards are left; see that DISTILLERY_LABELS names the same "
                "database here and where it ran"
            )
        self._ended_early[child.number] += 1
        title = self.job.of(child.number).title
        if self._ended_early[child.number] >= TRIES:
            # Another run of the same rows may have put another list in place.
            self.look(self.missing())
        if self._ended_early[child.number] >= TRIES:
            raise ModelError(
                f"{title} has brought no answers ({reason}), nor have the {TRIES - 1} before it; "
                "mend what it says and run again: what is done is kept"
            )
        get_run_logger().warning("%s has ended early (%s); another one follows", title, reason)

    def do_here(self, child: Child) -> None:
        """See `Work`."""
        number = self.shared.take()
        if number is not None:
            self.answer(number)
        self.look_on()

    def answer(self, number: int) -> None:
        """Answer a shard in this process."""
        shard = self.shards[number]
        self.answers[number] = answer_shard(self.job.model, self.job.prompt, shard)


def answer_by(children: Children, work: ShardWork, progress: StageProgress) -> None:
    """Have children answer all shards of `work`. Raises ModelError where they do it in vain."""
    work_by(children, work, progress)
    # After an error, the next run goes on with the list, and so do children of another one.
    with suppress(StoreError):
        work.shared.remove()


def answer_here(work: ShardWork, show: Callable[[int], None]) -> None:
    """Answer all shards of `work` whose answers are not known in this process. `show` is told how
    many rows are done."""
    for number in range(len(work.shards)):
        if number not in work.answers:
            work.answer(number)
        show(work.rows_done)

"""Child runs that answer shards: each shard once, whatever becomes of a child."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest

from distillery.errors import ModelError
from distillery.recipe import PromptRecipe
from distillery.records import Artifact, RegisteredModel, Shard, ShardAnswers, ShardedRows
from tasks import children as module
from tasks import shard_work
from tasks.children import TRIES, Child, Job
from tasks.progress import StageProgress
from tasks.shard_work import ShardsJob, ShardWork, answer_by, shards_taken

pytestmark = pytest.mark.usefixtures("home")


def digest(number: int) -> str:
    return f"{number:064x}"


def artifact(number: int) -> Artifact:
    return Artifact(uri=f"store/{digest(number)}", sha256=digest(number), bytes=1)


class Work(ShardWork):
    """Shards whose answers are kept in memory. `answered`: how often each of them was."""

    def __init__(self, count: int, kept: Iterable[int] = ()) -> None:
        self.store: dict[str, ShardAnswers] = {}
        self.answered = Counter[int]()
        model = RegisteredModel(
            artifact=artifact(1), name="m", version="1", registry="local", manifest_sha256=digest(2)
        )
        rows = ShardedRows(artifact=artifact(3), rows=10 * count, shards=count)
        shards = [
            Shard(artifact=artifact(100 + n), rows=10, rows_sha256=digest(200 + n))
            for n in range(count)
        ]
        job = ShardsJob(model=model, prompt=PromptRecipe(), rows=rows)
        super().__init__(job, shards, lambda shard, **_: self.store.get(shard.content_id))
        for number in kept:
            self.keep(number)
        self.look(range(count))

    def keep(self, number: int) -> None:
        self.answered[number] += 1
        self.store[self.shards[number].content_id] = ShardAnswers(
            artifact=artifact(300 + number), rows=10, failed=0
        )

    def answer_taken(self) -> bool:
        """Answer the next shard of the list. Return whether there was one."""
        number = self.shared.take()
        if number is not None:
            self.keep(number)
        return number is not None

    @property
    def once(self) -> bool:
        """Whether all shards have answers, and each was answered once."""
        return self.answered == Counter(range(len(self.shards)))


class Fakes:
    """Children that do at each look what `behave` says of them."""

    def __init__(self, work: Work, behave: Callable[[Child], None], most: int = 2) -> None:
        self.work, self.behave, self._most = work, behave, most
        self.started: list[int] = []
        self.ended: list[int] = []
        self.at_once = 0

    def most(self) -> int:
        return self._most

    def start(self, job: Job, key: str) -> Child:
        self.started.append(job.number)
        return Child(job.number, None)

    def look(self, children: Sequence[Child]) -> None:
        self.at_once = max(self.at_once, len(children))
        for child in children:
            self.behave(child)

    def end(self, children: Iterable[Child]) -> None:
        self.ended += [child.number for child in children]

    def diligent(self, child: Child) -> None:
        """Answer a shard at each look, until none is left."""
        if not self.work.answer_taken():
            child.reason, child.ended = "Completed", "done"


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_S", 0)
    for each in (module, shard_work):
        monkeypatch.setattr(each, "get_run_logger", lambda: logging.getLogger("test"))


def run(fakes: Fakes) -> None:
    answer_by(fakes, fakes.work, StageProgress("answer rows"))


def test_children_take_shards_until_none_is_left() -> None:
    """Each child is started once, and has as many shards as it has time for."""
    fakes = Fakes(Work(40), lambda child: fakes.diligent(child), most=3)
    run(fakes)
    assert fakes.work.once
    assert (fakes.started, fakes.at_once) == ([0, 1, 2], 3)
    assert fakes.work.shared.progress() == ([], 0), "the list is removed"


def test_shards_that_have_answers_are_offered_to_nobody() -> None:
    work = Work(6, kept=[0, 1, 2, 5])
    work.answered.clear()
    fakes = Fakes(work, lambda child: fakes.diligent(child), most=8)
    run(fakes)
    assert work.answered == Counter([3, 4])
    assert len(fakes.started) == 2
    assert work.answers.keys() == set(range(6))


def test_a_worker_that_comes_has_a_child_too() -> None:
    def behave(child: Child) -> None:
        fakes._most = 2
        fakes.diligent(child)

    fakes = Fakes(Work(8), behave, most=1)
    run(fakes)
    assert (fakes.work.once, fakes.started) == (True, [0, 1])


def test_what_a_dead_child_leaves_is_done_by_another_one(caplog: pytest.LogCaptureFixture) -> None:
    def behave(child: Child) -> None:
        if fakes.started == [0, 1] and child.number == 0:
            fakes.work.shared.take()
            child.reason, child.ended = "Crashed", "died"
        else:
            fakes.diligent(child)

    fakes = Fakes(Work(8), behave)
    run(fakes)
    assert fakes.work.once
    assert fakes.started[:3] == [0, 1, 0], "beside the one that is at work"
    assert caplog.messages == [
        "child run 1 has ended early (Crashed); another one follows",
        "not all shards that child runs have taken have answers; 1 are offered again",
    ]


def test_a_shard_that_kills_its_children_ends_the_run_in_one_line() -> None:
    def behave(child: Child) -> None:
        number = fakes.work.shared.take()
        if number == 5:
            child.reason, child.ended = "its process was killed", "died"
        elif number is None:
            child.reason, child.ended = "Completed", "done"
        else:
            fakes.work.keep(number)

    fakes = Fakes(Work(8), behave)
    with pytest.raises(ModelError) as caught:
        run(fakes)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith("child run 1 has brought no answers (its process was killed), nor have")
    assert fakes.work.answered == Counter(set(range(8)) - {5})


@pytest.mark.parametrize("most", [1, 4])
def test_children_that_fail_before_they_take_a_shard_end_the_run(most: int) -> None:
    def behave(child: Child) -> None:
        child.reason, child.ended = "run-1 ended as Failed: no such model", "failed"

    fakes = Fakes(Work(100), behave, most)
    with pytest.raises(ModelError, match=r"^child run 1 has .* \(run-1 ended as Failed: no"):
        run(fakes)
    assert Counter(fakes.started)[0] == TRIES


def test_a_child_that_gets_on_is_followed_as_often_as_it_takes() -> None:
    def behave(child: Child) -> None:
        fakes.work.answer_taken()
        child.reason, child.ended = "Crashed", "died"

    fakes = Fakes(Work(8), behave, most=1)
    run(fakes)
    assert (fakes.work.once, len(fakes.started)) == (True, 8)


@pytest.mark.parametrize(
    ("takes", "setting"), [(True, "DISTILLERY_STORE"), (False, "DISTILLERY_LABELS")]
)
def test_workers_with_another_store_or_database_end_the_run(takes: bool, setting: str) -> None:
    def behave(child: Child) -> None:
        while takes and fakes.work.shared.take() is not None:
            pass
        child.reason, child.ended = "Completed", "done"

    fakes = Fakes(Work(8), behave)
    with pytest.raises(ModelError, match=setting):
        run(fakes)
    assert len(fakes.started) <= TRIES * 2


def test_the_parent_answers_what_no_worker_takes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "TAKE_BACK_S", 0)
    here: list[str] = []

    def answer(_model: Any, _prompt: Any, shard: Shard) -> ShardAnswers:
        here.append(shard.content_id)
        return ShardAnswers(artifact=artifact(300), rows=10, failed=0)

    monkeypatch.setattr(shard_work, "answer_shard", answer)

    def behave(child: Child) -> None:
        child.taken = False

    fakes = Fakes(Work(5), behave)
    run(fakes)
    assert here == [shard.content_id for shard in fakes.work.shards]
    assert fakes.ended == fakes.started
    assert len(caplog.messages) == 1


def test_the_parent_waits_while_a_child_is_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TAKE_BACK_S", 0)
    monkeypatch.setattr(shard_work, "answer_shard", lambda *_: pytest.fail("the parent answers"))

    def behave(child: Child) -> None:
        child.taken = child.number == 0
        if child.taken:
            fakes.diligent(child)

    fakes = Fakes(Work(4), behave)
    run(fakes)
    assert fakes.work.once
    assert fakes.ended == [1], "it was cancelled when nothing was left for it"


def test_children_are_ended_with_their_parent() -> None:
    def behave(_child: Child) -> None:
        raise KeyboardInterrupt

    fakes = Fakes(Work(8), behave)
    with pytest.raises(KeyboardInterrupt):
        run(fakes)
    assert fakes.ended == fakes.started
    assert fakes.work.shared.progress() == ([], 8), "the next run goes on with the list"


def test_a_new_parent_goes_on_with_the_list_of_one_that_died() -> None:
    dead = Work(8)
    dead.shared.offer(range(8))
    for _ in range(3):
        dead.answer_taken()
    dead.shared.take()
    work = Work(8)
    work.store = dead.store
    fakes = Fakes(work, lambda child: fakes.diligent(child))
    run(fakes)
    assert (dead.answered + work.answered) == Counter(range(8))


@pytest.mark.parametrize("meanwhile", ["taken", "removed"])
def test_a_list_that_others_change_ends_no_run_early(meanwhile: str) -> None:
    """Another parent's children take the last shards, or it removes the list, as soon as this one
    has offered it."""
    work = Work(3)
    offer, others = work.shared.offer, iter([meanwhile])

    def offer_and_lose(numbers: Sequence[int]) -> None:
        offer(numbers)
        lost = next(others, None)
        if lost == "removed":
            work.shared.remove()
        while lost == "taken" and work.shared.take() is not None:
            pass

    work.shared.offer = offer_and_lose  # type: ignore[method-assign]
    fakes = Fakes(work, lambda child: fakes.diligent(child))
    run(fakes)
    assert work.once


def test_a_child_that_is_taken_while_the_parent_works_is_not_cancelled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A worker takes it, and it takes the last shard, while the parent answers another one."""
    monkeypatch.setattr(module, "TAKE_BACK_S", 0)
    at_work: list[int] = []

    def answer(_model: Any, _prompt: Any, shard: Shard) -> ShardAnswers:
        number = fakes.work.shared.take()
        assert number is not None
        at_work.append(number)
        return ShardAnswers(artifact=artifact(300), rows=10, failed=0)

    def behave(child: Child) -> None:
        looks = at_work.count(1)
        if child.taken and looks:
            fakes.work.keep(1)
            child.reason, child.ended = "Completed", "done"
        child.taken = looks > 0

    monkeypatch.setattr(shard_work, "answer_shard", answer)
    fakes = Fakes(Work(2), behave, most=1)
    run(fakes)
    assert (fakes.started, fakes.ended) == ([0], [])
    assert (at_work, fakes.work.answered) == ([1], Counter([1]))


def test_a_child_finds_the_list_of_its_parent() -> None:
    work = Work(4)
    work.shared.offer([1, 3])
    found = list(shards_taken(work.job.of(7), work.shards))
    assert found == [work.shards[1], work.shards[3]]


def test_a_childs_key_is_of_shards_model_and_prompt() -> None:
    def key(number: int = 0, **changed: Any) -> str:
        work = Work(4)
        work.job = work.job.model_copy(update=changed)
        return work.key(number)

    assert key() == key() != key(1)
    model = Work(1).job.model
    assert key(model=model.model_copy(update={"version": "2"})) != key()
    assert key(prompt=PromptRecipe(system="Pick.")) != key()
    other = Work(4)
    other.shards = [*other.shards[:3], other.shards[0]]
    assert other.key(0) != key()

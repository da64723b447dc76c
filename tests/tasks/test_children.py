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
from tasks.children import (
    FEWEST_WORKERS,
    LARGEST_GROUP,
    Child,
    Group,
    Job,
    ShardsJob,
    ShardWork,
    groups_of,
    work_by,
)
from tasks.progress import StageProgress


def digest(number: int) -> str:
    return f"{number:064x}"


def artifact(number: int) -> Artifact:
    return Artifact(uri=f"store/{digest(number)}", sha256=digest(number), bytes=1)


class Work(ShardWork):
    """Shards whose answers are kept in memory. `here`: those that the parent has answered."""

    def __init__(self, count: int, kept: Iterable[int] = ()) -> None:
        self.store: dict[str, ShardAnswers] = {}
        self.here: list[int] = []
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
            self.answer(number)
        self.look(range(count))

    def answer(self, number: int) -> None:
        self.store[self.shards[number].content_id] = ShardAnswers(
            artifact=artifact(300 + number), rows=10, failed=0
        )

    def do_here(self, number: int) -> None:
        self.here.append(number)
        self.answer(number)
        self.look([number])


class Fakes:
    """Children that do at each look what `behave` says of them."""

    def __init__(self, work: Work, behave: Callable[[Child], None], most: int = 2) -> None:
        self.work, self.behave, self._most = work, behave, most
        self.started: list[Group] = []
        self.ended: list[Group] = []
        self.at_once = 0

    def most(self) -> int:
        return self._most

    def workers(self) -> int:
        return self._most

    def start(self, job: Job, key: str) -> Child:
        group = Group(job.first, job.count)
        self.started.append(group)
        return Child(group, None)

    def look(self, children: Sequence[Child]) -> None:
        self.at_once = max(self.at_once, len(children))
        for child in children:
            self.behave(child)

    def end(self, children: Iterable[Child]) -> None:
        self.ended += [child.group for child in children]

    def diligent(self, child: Child) -> None:
        for number in child.group.numbers:
            self.work.answer(number)
        child.reason = "Completed"


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_S", 0)
    monkeypatch.setattr(module, "get_run_logger", lambda: logging.getLogger("test"))


def run(fakes: Fakes) -> None:
    work_by(fakes, fakes.work, StageProgress("answer rows"))


def test_groups_become_smaller_and_hold_each_shard_once() -> None:
    for shards in (1, 2, 7, 64, 489):
        for children in (1, 2, 8, 100):
            groups = list(groups_of(shards, children))
            numbers = [number for group in groups for number in group.numbers]
            assert numbers == list(range(shards))
            sizes = [group.size for group in groups]
            assert sizes == sorted(sizes, reverse=True)
            assert sizes[0] <= LARGEST_GROUP
            assert len(groups) >= min(shards, max(children, FEWEST_WORKERS))


def test_shards_that_have_answers_are_sent_to_nobody() -> None:
    work = Work(6, kept=[0, 1, 2, 5])
    fakes = Fakes(work, lambda child: fakes.diligent(child), most=8)
    run(fakes)
    assert fakes.started == [Group(3, 1), Group(4, 1)]
    assert work.answers.keys() == set(range(6))


def test_no_more_children_than_allowed_are_at_work() -> None:
    fakes = Fakes(Work(40), lambda child: fakes.diligent(child), most=3)
    run(fakes)
    assert fakes.at_once == 3
    assert sorted(n for group in fakes.started for n in group.numbers) == list(range(40))


def test_what_a_dead_child_leaves_is_done_by_another_one() -> None:
    deaths = Counter[Group]()

    def behave(child: Child) -> None:
        if child.group.first == 0 and not deaths[child.group]:
            deaths[child.group] += 1
            fakes.work.answer(0)
            child.reason = "Crashed"
        else:
            fakes.diligent(child)

    fakes = Fakes(Work(8), behave)
    run(fakes)
    assert Counter(fakes.started)[fakes.started[0]] == 2
    assert len(fakes.started) == len(set(fakes.started)) + 1


def test_children_that_end_in_vain_end_the_run_in_one_line() -> None:
    def behave(child: Child) -> None:
        if 5 in child.group.numbers:
            child.reason = "run-1 ended as Failed: no such model"
        else:
            fakes.diligent(child)

    fakes = Fakes(Work(8), behave, most=1)
    with pytest.raises(ModelError) as caught:
        run(fakes)
    line = str(caught.value)
    assert "\n" not in line
    assert "left 1 undone (run-1 ended as Failed: no such model)" in line
    assert [5 in group.numbers for group in fakes.started].count(True) == module.TRIES


def test_a_child_that_gets_on_is_followed_as_often_as_it_takes() -> None:
    def behave(child: Child) -> None:
        fakes.work.answer(fakes.work.missing(child.group)[0])
        child.reason = "Crashed"

    fakes = Fakes(Work(8), behave, most=1)
    run(fakes)
    assert len(fakes.started) == 8


def test_the_parent_answers_what_no_worker_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TAKE_BACK_S", 0)

    def behave(child: Child) -> None:
        child.taken = False

    fakes = Fakes(Work(5), behave)
    run(fakes)
    assert fakes.work.here == list(range(5))
    assert fakes.ended == fakes.started


def test_the_parent_waits_while_a_child_is_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TAKE_BACK_S", 0)
    looks = Counter[Group]()

    def behave(child: Child) -> None:
        looks[child.group] += 1
        child.taken = child.group == fakes.started[0] or looks[fakes.started[0]] > 3
        if looks[child.group] > 3:
            fakes.diligent(child)

    fakes = Fakes(Work(2), behave)
    run(fakes)
    assert not fakes.work.here


def test_children_are_ended_with_their_parent() -> None:
    def behave(_child: Child) -> None:
        raise KeyboardInterrupt

    fakes = Fakes(Work(8), behave)
    with pytest.raises(KeyboardInterrupt):
        run(fakes)
    assert fakes.ended == fakes.started


def test_a_childs_key_is_of_shards_model_and_prompt() -> None:
    def key(**changed: Any) -> str:
        work = Work(4)
        work.job = work.job.model_copy(update=changed)
        return work.key(Group(1, 2))

    assert key() == key()
    model = Work(1).job.model
    assert key(model=model.model_copy(update={"version": "2"})) != key()
    assert key(prompt=PromptRecipe(system="Pick.")) != key()
    assert Work(4).key(Group(0, 2)) != key()
    other = Work(4)
    other.shards = [*other.shards[:3], other.shards[0]]
    assert other.key(Group(1, 2)) == key()

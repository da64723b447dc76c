"""Children that ask about parts of a labelling: who follows whom, and what is left to the run."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest

from distillery.recipe import PromptRecipe, Recipe, TeacherRecipe
from distillery.records import Artifact, Rows
from tasks import children as children_module
from tasks import label_parts as module
from tasks import parts_work as parts_module
from tasks.children import TRIES, Child, Job, work_by
from tasks.label_parts import LabelJob, parts_first
from tasks.locks import Lease
from tasks.parts_work import PartsWork
from tasks.progress import StageProgress

PARTS = 3


def work() -> PartsWork:
    artifact = Artifact(uri=f"store/{'1' * 64}", sha256="1" * 64, bytes=1)
    job = LabelJob(
        rows=Rows(artifact=artifact, file="train.jsonl", rows=30, sha256="2" * 64),
        prompt=PromptRecipe(),
        teacher=TeacherRecipe(),
        run="a-run",
        recipe="mine",
        identities=("gpt-test",),
        database="3" * 32,
        lease=Lease(key="ask", holder="a-run"),
        parts=PARTS,
    )
    return PartsWork(job, 30, "calls", lambda: 12.0)


class Fakes:
    """Children that end as `behave` says at the first look at them."""

    def __init__(self, behave: Callable[[Child], None]) -> None:
        self._behave = behave
        self.started: list[int] = []

    def most(self) -> int:
        return PARTS

    def start(self, job: Job, key: str) -> Child:
        self.started.append(job.number)
        return Child(job.number, None)

    def look(self, children: Sequence[Child]) -> None:
        for child in children:
            self._behave(child)

    def end(self, children: Iterable[Child]) -> None: ...


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children_module, "POLL_S", 0)
    for each in (children_module, parts_module):
        monkeypatch.setattr(each, "get_run_logger", lambda: logging.getLogger("test"))


def started(behave: Callable[[Child], None]) -> Counter[int]:
    """How many children were started for each part."""
    fakes = Fakes(behave)
    work_by(fakes, work(), StageProgress("ask in processes"))
    return Counter(fakes.started)


def test_each_part_has_a_child_of_its_own() -> None:
    def behave(child: Child) -> None:
        child.reason, child.ended = "its process ended", "done"

    assert started(behave) == {0: 1, 1: 1, 2: 1}


def test_a_child_that_has_died_is_followed_until_the_run_takes_its_part(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def behave(child: Child) -> None:
        child.reason, child.ended = "its process was killed", "died"
        if child.number != 1:
            child.ended = "done"

    assert started(behave) == {0: 1, 1: TRIES, 2: 1}
    assert caplog.messages == [
        *["part 2 has ended early (its process was killed); another one follows"] * (TRIES - 1),
        "part 2: its process was killed; this run asks what is left itself",
    ]


def test_a_child_that_ends_in_an_error_is_followed_by_the_run(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def behave(child: Child) -> None:
        child.reason, child.ended = "its process ended (error: the budget)", "failed"

    assert started(behave) == {0: 1, 1: 1, 2: 1}
    assert len(caplog.messages) == PARTS


def test_it_is_known_whether_all_parts_have_failed() -> None:
    for good in ({0, 1, 2}, {1}, set()):
        given = work()
        for part in range(PARTS):
            ended: Any = "done" if part in good else "failed"
            given.take_in(Child(part, None, reason="it ended", ended=ended))
        assert given.all_failed == (not good)


def test_what_no_worker_takes_is_left_to_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children_module, "TAKE_BACK_S", 0)

    def behave(child: Child) -> None:
        child.taken = False

    assert started(behave) == {0: 1, 1: 1, 2: 1}


def asking(asked: list[Any], kept: int, went: bool) -> Callable[..., bool]:
    """What stands for `ask_in_processes`: it keeps one of its arguments."""

    def ask(*given: Any) -> bool:
        asked.append(given[kept])
        return went

    return ask


def test_endpoints_alone_are_asked_by_several_and_only_where_the_run_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(module, "rows_to_ask", lambda recipe, *_: [("rows", recipe.teacher)])
    monkeypatch.setattr(module, "ask_in_processes", asking(asked, -1, went=True))
    nothing: Any = None

    def first(preset: str, deployment: str | None = None, **teacher: Any) -> None:
        recipe = Recipe.model_validate({"preset": preset, "teacher": teacher})
        parts_first(recipe, nothing, nothing, "gpt-test", True, deployment)

    first("lab")
    first("demo", "label-parts/cpu")
    assert asked == []
    first("lab", processes=2)
    first("lab", "label-parts/cpu")
    assert asked == [None, "label-parts/cpu"]


@pytest.mark.parametrize(("went", "splits"), [(True, 3), (False, 1)])
def test_after_children_that_all_failed_no_other_split_is_tried(
    went: bool, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        module, "rows_to_ask", lambda recipe, *_: [(name, recipe.teacher) for name in "abc"]
    )
    monkeypatch.setattr(module, "ask_in_processes", asking(asked, 0, went))
    nothing: Any = None
    recipe = Recipe.model_validate({"preset": "lab", "teacher": {"processes": 2}})
    parts_first(recipe, nothing, nothing, "gpt-test", True)
    assert len(asked) == splits


def test_calls_are_shown_and_a_childs_key_is_of_its_run_and_part() -> None:
    first = work()
    first.look_on()
    assert first.units == (12.0, 30, "calls")
    assert first.key(0) == work().key(0) != work().key(1)
    other = work()
    other.job = other.job.model_copy(update={"run": "another"})
    assert other.key(0) != first.key(0)

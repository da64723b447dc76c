"""Children that ask models a part of the test rows: which models and slices, and what is left to
the run."""

from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from prefect import flow

from distillery.errors import DataError, ModelError, RecipeError
from distillery.evaluation import slices as domain
from distillery.machine import machine_name, processor_name
from distillery.recipe import BaseModelRecipe, PromptRecipe, Recipe
from distillery.records import Artifact, OnnxModel, Rows, ScoredSlice, StudentCheckpoint
from flows import distill
from tasks import score_parts as module
from tasks import slices as slices_module
from tasks.results import results_in_store
from tasks.score_parts import ScoredSlices, ScoreJob, in_parts, score_in_processes, slices_of_part
from tasks.scored_models import AskedModel
from tasks.slices import Scoring, known_slices
from tasks.stage import content_of

ROWS = 6 * domain.SLICE_ROWS - 100


def artifact(number: int) -> Artifact:
    return Artifact(uri=f"store/{number:064x}", sha256=f"{number:064x}", bytes=1)


TEST = Rows(artifact=artifact(1), file="test.jsonl", rows=ROWS, sha256="2" * 64)
EXPORTED = AskedModel(
    prompt=PromptRecipe(),
    exported=OnnxModel(artifact=artifact(3), precision="int8", algorithm="rtn", parameters=7),
)
FLOAT = AskedModel(prompt=PromptRecipe(), base=BaseModelRecipe(model="maker/model", revision="a1"))


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_a_part_has_slices_of_all_models_and_no_slice_is_in_two() -> None:
    models = [FLOAT, EXPORTED]
    parts = [slices_of_part(models, ROWS, part, 3) for part in range(3)]
    found = [each for part in parts for each in part]
    assert len(found) == 2 * 5
    for model in models:
        assert sorted(number for own, number in found if own is model) == [1, 2, 3, 4, 5]
    assert {len(part) for part in parts} == {3, 4}
    assert all({id(own) for own, _ in part} == {id(FLOAT), id(EXPORTED)} for part in parts)


def test_slices_are_found_up_to_the_first_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    known, looked = {1, 3}, list[int]()

    class Known:
        def find(self, _model: AskedModel, _test: Rows, number: int) -> ScoredSlice | None:
            looked.append(number)
            return ScoredSlice(artifact=artifact(9), rows=10) if number in known else None

    monkeypatch.setattr(module, "KnownSlices", Known)
    found = ScoredSlices(ScoreJob(models=(EXPORTED,), test=TEST, parts=2))
    assert (found.made(), looked) == (2 * 10, [1, 3, 5, 2])
    known.add(5)
    looked.clear()
    assert (found.made(), looked) == (3 * 10, [5, 2])


def test_slices_that_were_known_before_count_as_nobodys_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = SimpleNamespace(find=lambda *_: ScoredSlice(artifact=artifact(9), rows=10))
    monkeypatch.setattr(module, "KnownSlices", lambda: known)
    job = ScoreJob(models=(EXPORTED,), test=TEST, parts=1)
    before = {(EXPORTED.content_id, number) for number in (1, 4, 5)}
    assert ScoredSlices(job, before).made() == 2 * 10


@pytest.mark.parametrize("kind", [ModelError, RecipeError])
def test_a_model_that_cannot_be_asked_here_keeps_no_other_from_being_asked(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def ask(model: AskedModel, _test: Rows, number: int, _slice_rows: int) -> ScoredSlice:
        asked.append((model, number))
        if model is FLOAT:
            raise kind("this machine has other cores")
        return ScoredSlice(artifact=artifact(9), rows=10)

    monkeypatch.setattr(module, "score_slice", ask)
    job = ScoreJob(models=(FLOAT, EXPORTED), test=TEST, parts=1)
    with pytest.raises(kind, match="other cores"):
        module.score_part(job)
    assert asked == [(FLOAT, 1), *((EXPORTED, number) for number in range(1, 6))]
    asked.clear()
    assert module.score_part(ScoreJob(models=(EXPORTED,), test=TEST, parts=2, number=1)) == 2 * 10
    assert asked == [(EXPORTED, 2), (EXPORTED, 4)]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Of which models children are asked, and on which deployment."""
    found: list[Any] = []

    def ask(models: Any, test: Rows, _processes: int, deployment: str | None) -> None:
        assert test is TEST
        found.append(([each.model_copy(update={"machine": ""}) for each in models], deployment))

    monkeypatch.setattr(module, "score_in_processes", ask)
    return found


class Scores:
    """A stage that scores. `cached`: whether its call is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.refresh_cache: bool | None = None
        self.cached = False
        monkeypatch.setattr(module, "is_cached", lambda stage, **given: stage.cached)

    def __call__(self, test: Rows) -> str:
        return "the report"


def test_several_ask_where_the_run_says_so_and_what_several_can(
    asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage: Any = Scores(monkeypatch)

    def ran(processes: int, deployment: str | None = None, models: Any = (FLOAT, EXPORTED)) -> Any:
        asked.clear()
        call: Any = in_parts(stage, models, processes, deployment)
        assert call(test=TEST) == "the report"
        return asked

    assert ran(1) == []
    # Each of the processes has a part of the cores, by which Transformers' numbers go.
    assert ran(4) == [([EXPORTED], None)]
    assert ran(4, models=(FLOAT,)) == []
    assert ran(1, "score-rows/cpu") == [([FLOAT, EXPORTED], "score-rows/cpu")]
    own_code = BaseModelRecipe(model="maker/model", revision="a1", trust_remote_code=True)
    assert ran(1, "score-rows/cpu", [AskedModel(prompt=PromptRecipe(), base=own_code)]) == []
    stage.cached = True
    assert ran(4) == []
    stage.refresh_cache = True
    assert ran(4) == [([EXPORTED], None)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert ran(4, "score-rows/cpu") == [([EXPORTED], "score-rows/cpu")]


def test_a_models_key_is_of_what_its_numbers_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    exported, kept = EXPORTED.here(), FLOAT.here()
    assert exported.machine == f"{processor_name()}, onnxruntime {version('onnxruntime')}"
    assert kept.machine.startswith(f"{machine_name()}, torch {version('torch')}, transformers ")
    keys = {content_of(each) for each in (exported, kept)}
    assert {content_of(each.here()) for each in (exported, kept)} == keys
    for model in (exported, kept):
        prompt = PromptRecipe(system="Pick.")
        other = AskedModel(prompt=prompt, base=model.base, exported=model.exported)
        assert content_of(other.here()) not in keys
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        assert content_of(kept.here()) not in keys
        assert content_of(exported.here()) in keys
    with monkeypatch.context() as patch:
        patch.setattr("tasks.scored_models.version", lambda _: "another")
        assert not {content_of(each.here()) for each in (exported, kept)} & keys
    for name in ("processor_name", "machine_name"):
        monkeypatch.setattr(f"tasks.scored_models.{name}", lambda: "another")
    assert not {content_of(each.here()) for each in (exported, kept)} & keys


def test_a_worker_on_another_machine_asks_nothing_and_says_so() -> None:
    elsewhere = EXPORTED.model_copy(update={"machine": "Another Processor"})
    with pytest.raises(ModelError) as caught:
        Scoring(1).load(elsewhere, TEST)
    assert str(caught.value) == (
        f"this machine ({EXPORTED.machine_of()}) may compute other last bits than the run's "
        "(Another Processor), which asks this model itself"
    )


def test_few_rows_have_nothing_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def look() -> Any:
        raise AssertionError

    monkeypatch.setattr(slices_module, "KnownSlices", look)
    few = TEST.model_copy(update={"rows": domain.SLICE_ROWS})
    assert known_slices(EXPORTED, few) == {}


def test_a_run_has_all_models_of_its_scoreboard_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = StudentCheckpoint(
        artifact=artifact(4), method="full", base="maker/model", parameters=7, steps=1
    )
    student = OnnxModel(artifact=artifact(5), precision="int4", algorithm="rtn", parameters=7)
    data: Any = SimpleNamespace(rows=lambda _: TEST, rows_if_any=lambda _: None)
    local: Any = SimpleNamespace(model=EXPORTED.exported)
    labels: Any = None
    taught = distill.Taught(data, local, "a teacher", labels)
    for name, made in {
        "labelled_rows": taught,
        "student_base": FLOAT.base,
        "trained_student": checkpoint,
        "exported": student,
    }.items():
        monkeypatch.setattr(distill, name, lambda *_, made=made, **__: made)
    asked = []

    def recorded(stage: Any, models: Any, *how: Any) -> Any:
        asked.append((stage.name, [*models], how))
        return lambda **_: None

    monkeypatch.setattr(distill, "in_parts", recorded)
    recipe = Recipe.model_validate({"preset": "demo", "evaluation": {"processes": 3}})
    distill.made_student(recipe, data, None, (), evaluation_deployment="score-rows/cpu")
    how, prompt = (3, "score-rows/cpu"), recipe.student_prompt
    assert recipe.asks_base_model
    assert asked == [
        ("ask base model", [AskedModel(prompt=prompt, base=FLOAT.base)], how),
        (
            "evaluate",
            [
                AskedModel(prompt=prompt, base=FLOAT.base, checkpoint=checkpoint),
                AskedModel(prompt=prompt, exported=student),
                AskedModel(prompt=recipe.prompt, exported=EXPORTED.exported),
            ],
            how,
        ),
    ]


@pytest.mark.usefixtures("prefect_api")
def test_few_rows_start_no_process_and_a_wrong_deployment_is_one_line(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(module, "work_by", lambda *_: pytest.fail("a process was started"))
    leases = []

    def lease(key: str) -> AbstractContextManager[None]:
        leases.append(key)
        return nullcontext()

    monkeypatch.setattr(module, "leased", lease)

    @flow
    def run(rows: int, processes: int, deployment: str | None = None) -> None:
        test = TEST.model_copy(update={"rows": rows})
        score_in_processes((EXPORTED.here(),), test, processes, deployment)

    with results_in_store():
        run(domain.SLICE_ROWS + 2 * domain.ROWS_OF_A_PART - 1, 8)
        assert "1999 rows to ask: one process asks them" in caplog.text
        with pytest.raises(DataError) as caught:
            run(ROWS, 1, "score-rows/gone")
    assert len(set(leases)) == 1, "two runs with the same rows do not ask at once"
    assert str(caught.value) == (
        "evaluation_deployment: no deployment score-rows/gone here; `prefect deploy --all`"
    )


def test_the_number_of_processes_is_told_where_it_is_not_one_and_is_in_no_key() -> None:
    recipe = Recipe.model_validate({"evaluation": {"processes": 4}})
    assert recipe.model_dump()["evaluation"]["processes"] == 4
    assert "processes" not in Recipe().model_dump()["evaluation"]
    assert content_of(recipe) == content_of(Recipe())

"""The ladder: what is measured, kept and shown; and real ladders on a tiny model."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from made_rungs import FORMS, earlier_ladder, rung, timed_ladder
from pydantic import BaseModel
from tiny_recipe import row

from distillery.data.examples import read_examples
from distillery.errors import DataError, ExportError, OutOfResources
from distillery.evaluation.gold import Gold
from distillery.evaluation.scoring import (
    ModelToScore,
    Scored,
    ScoringJob,
    departure,
    score_model,
)
from distillery.evaluation.scoring_process import score
from distillery.evaluation.statistics import paired_interval
from distillery.export import ladder
from distillery.export.build import ask_once
from distillery.export.ladder import (
    CALIBRATION_PROMPTS,
    LADDER_FILE,
    climb,
    measured,
)
from distillery.export.ladder_table import render_ladder, table
from distillery.export.rung_process import BuildingJob, Built, build
from distillery.labels.known import gold_labels
from distillery.machine import machine_name
from distillery.models.inspect import model_and_adapter
from distillery.models.load import load_tokenizer
from distillery.progress import ShowProgress, show_nothing
from distillery.prompts import TransformersTokenizer, render_ids
from distillery.recipe import (
    Choose,
    ExportBounds,
    ExportForm,
    ExportRecipe,
    PromptRecipe,
    TrainingRecipe,
)
from distillery.records import Departure, Example, Ladder, Rung, TeacherLabel
from distillery.training.fine_tune import fine_tune
from distillery.training.rows import training_rows

TinyModel = Callable[[str], Path]
PROMPT = PromptRecipe(system="Pick.", user="{question}\n{choices}", choice="{letter}) {text}")


def scored(
    answers: str,
    probabilities: Sequence[tuple[float, ...] | None] = (),
    latencies_ms: Sequence[float] = (1.0,),
) -> Scored:
    """What a scoring process tells; '-' for a row that was not asked."""
    letters = tuple(None if letter == "-" else letter for letter in answers)
    given = tuple(probabilities) or tuple(
        None if letter is None else (0.5, 0.5) for letter in letters
    )
    return Scored(
        answers=letters,
        probabilities=given,
        latencies_ms=tuple(latencies_ms),
        rows_per_second=1.0,
        peak_mib=1.0,
        load_s=1.0,
        ran_on="here",
    )


def test_a_rung_is_measured_beside_the_float_student() -> None:
    own = scored("ABB-", [(0.8, 0.2), (0.4, 0.6), (0.1, 0.9), None], (1.0, 2.0, 5.0))
    exact = scored("AAB-", [(0.9, 0.1), (0.7, 0.3), (0.1, 0.9), None])
    found = measured(FORMS["rtn"], 7, own, exact, Gold([("A",), ("A",), ("B",), ("A",)]))
    assert (found.bytes, found.accuracy, found.difference) == (7, 0.5, -0.25)
    assert found.interval == paired_interval([True, False, True, False], [True, True, True, False])
    assert found.departure is not None
    assert found.departure.mean == pytest.approx((0.1 + 0.1 + 0.3 + 0.3 + 0 + 0) / 6)
    assert found.departure.largest == pytest.approx(0.3)
    assert found.departure.changed == 1
    assert (found.p50_ms, found.rows_per_second) == (2.0, 375.0)
    gold = Gold([("A",), ("B",)])
    unasked = measured(FORMS["rtn"], 7, scored("--", latencies_ms=()), scored("--"), gold)
    assert (unasked.p50_ms, unasked.rows_per_second) == (None, None)


def test_a_form_that_writes_is_judged_by_its_metric() -> None:
    """It has no probabilities, and every other text is a changed answer."""
    gold = Gold([('{"a": "x", "b": "y"}',), ('{"a": "z"}',), ('{"a": "w"}',)], "field_f1")
    unknown = (None, None, None)
    right = [each for (each,) in gold.answers]
    exact = scored("---", unknown).model_copy(update={"answers": (*right[:2], '{"a": "v"}')})
    own = exact.model_copy(update={"answers": ('{"a": "x"}', None, '{"a": "v"}')})
    found = measured(FORMS["rtn"], 7, own, exact, gold)
    assert found.departure == Departure(changed=2)
    # 1 pair of 4 is found, of 2 given; the float student finds 3 of 4.
    assert found.accuracy == pytest.approx(2 * 1 / (4 + 2))
    assert found.difference == pytest.approx(2 / 6 - 6 / 8)
    assert found.interval is not None
    assert found.interval.low < -0.4
    shown = Ladder(rows=3, accuracy=0.75, largest_loss=0.5, rungs=(found,), metric="field_f1")
    text = render_ladder(shown)
    assert "field F1" in text
    for absent in ("accuracy", "|dp|"):
        assert absent not in text
    assert list(table(shown)[1])[-2:] == ["answers changed", "verdict"]
    assert table(shown)[1]["answers changed"] == "2"
    assert "metric" not in timed_ladder().model_dump()


def test_rows_of_different_options_count_option_by_option() -> None:
    own, exact = (
        scored("AA", [(0.6, 0.4), (0.6, 0.2, 0.2)]),
        scored("AA", [(0.9, 0.1), (0.6, 0.2, 0.2)]),
    )
    assert departure(own, exact).mean == pytest.approx(0.6 / 5)
    assert departure(scored("-"), scored("-")) == Departure(mean=0, largest=0, changed=0)


def test_a_row_that_one_of_them_was_not_asked_is_no_changed_answer() -> None:
    assert departure(scored("A-B"), scored("ABA")).changed == 1
    assert departure(scored("AB"), scored("A-")).changed == 0


def ladder_of(*rungs: Rung) -> Ladder:
    return Ladder(rows=100, accuracy=0.85, largest_loss=0.02, rungs=rungs)


def test_the_table_shows_every_rung_and_fits_a_terminal() -> None:
    wide = ExportForm(algorithm="k_quant_mixed", block_size=128, adapter_apart=True)
    reason = (
        "left out: its process was killed, as happens when memory runs out; "
        "free memory and run again"
    )
    shown = ladder_of(
        rung(40, 2, 100, size=12_345_600_000, speed=1234.5, form=wide, note="may lose more"),
        rung(1, 0, 100, size=66_100_000, speed=80, note="picked", picked=True),
        Rung(form=FORMS["gptq"], note=reason),
    )
    text = render_ladder(shown)
    assert max(map(len, text.splitlines())) <= 120
    assert "…" not in text
    for figure in (
        "float student",
        "0.850",
        "int4 k_quant_mixed/128, apart",
        "12345.6 MB",
        "66.1 MB",
        "1234.5",
        "80.0",
        "12.5",
        "picked",
    ):
        assert figure in text, figure
    assert f"int4 gptq/32: {reason}" in text.splitlines()
    rows = table(shown)
    assert [line["form"] for line in rows] == [
        "float student",
        wide.title,
        "int4 rtn/32",
        "int4 gptq/32",
    ]
    assert rows[2]["points vs float [95 %]"].startswith("-1.0 [-")
    assert (rows[2]["mean |dp|"], rows[2]["largest |dp|"], rows[2]["answers changed"]) == (
        "0.0123",
        "0.456",
        "1",
    )
    assert rows[3]["verdict"] == reason
    assert (rows[2]["rows/s"], rows[2]["p50 ms"], rows[2]["folder"]) == ("80.0", "12.5", "66.1 MB")
    assert "export.choose" not in text, "a ladder of an earlier version gives no reason"
    chosen = shown.model_copy(update={"choose": ExportBounds(latency_ms=20), "reason": "why"})
    assert render_ladder(chosen).splitlines()[-1] == (
        "export.choose is {latency_ms: 20}: int4 rtn/32 is why"
    )


def test_a_ladder_of_an_earlier_version_is_shown_without_speeds() -> None:
    ladder = earlier_ladder()
    assert ladder.choose == "smallest"
    assert table(ladder)[1]["rows/s"] == ""
    text = render_ladder(ladder)
    assert "int4 rtn/32 80.0 MB 0.840" in " ".join(text.split())
    assert text.splitlines()[-1].startswith("export.largest_loss allows 2.0 points")


# The climb itself, without models


VALIDATION = [
    Example(example_id=f"v{n}", question=f"no {n}?", choices=("a", "b"), answer_key="A")
    for n in range(20)
]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Validation and train rows."""
    validation, train = tmp_path / "validation.jsonl", tmp_path / "train.jsonl"
    validation.write_text("".join(f"{example.model_dump_json()}\n" for example in VALIDATION))
    unanswered = [
        Example(example_id=f"t{n}", question=f"row {n}", choices=("a", "b")) for n in range(200)
    ]
    train.write_text("".join(f"{example.model_dump_json()}\n" for example in unanswered))
    return validation, train


class Asked(NamedTuple):
    """A form that was asked the rows, and the forms whose folders were there then."""

    form: str
    there: set[str]


@pytest.fixture
def asked() -> list[Asked]:
    return []


@pytest.fixture
def latencies() -> dict[str, list[float]]:
    """What a form's rows take, in milliseconds: each time that it is asked the next figure, and the
    last one from then on. A form that is not here takes 1 ms."""
    return {}


@pytest.fixture
def built(
    monkeypatch: pytest.MonkeyPatch, asked: list[Asked], latencies: dict[str, list[float]]
) -> dict[str, tuple[int, str]]:
    """Stands for building and scoring: what is in here by a form's title is its size and its 20
    answers; a form that is not can't be built. The float student is right on all rows."""
    forms: dict[str, tuple[int, str]] = {}

    def run_in_process(module: str, job: BaseModel, limit_s: float, progress: ShowProgress) -> str:
        progress(1, 2, "pass 2 of 2, build")
        assert module == "distillery.export.rung_process"
        assert isinstance(job, BuildingJob)
        assert job.adapter == "the-adapter"
        assert job.calibration is None or Path(job.calibration).is_file()
        assert limit_s == 60 * 60
        if job.form.title not in forms:
            # As the process names the form and its folder.
            raise OutOfResources(f"{job.form.title}: {job.out}: no time")
        Path(job.out).mkdir()
        (Path(job.out) / "form.txt").write_text(job.form.title)
        if job.form.algorithm == "gptq":
            assert job.calibration is not None
            (Path(job.out) / "prompts.jsonl").write_text(Path(job.calibration).read_text())
        return Built(bytes=forms[job.form.title][0]).model_dump_json()

    def score_model(
        model: ModelToScore,
        rows: Path,
        prompt: PromptRecipe,
        threads: int | None,
        precision: str = "",
        *,
        progress: ShowProgress = show_nothing,
        timed_rows: int = 0,
    ) -> Scored:
        assert timed_rows in (0, ladder.TIMED_ROWS)
        assert len(read_examples(rows)) == 20, "validation rows alone"
        assert (prompt, threads) == (PROMPT, 3)
        assert precision == ("float32" if model.kind == "transformers" else "")
        progress(7, 20, "7 of 20 rows")
        if model.kind == "transformers":
            return scored("A" * 20)
        assert (Path(model.folder) / "form.txt").read_text() == model.name
        there = {file.read_text() for file in Path(model.folder).parent.glob("*/form.txt")}
        asked.append(Asked(model.name, there))
        own = latencies.get(model.name, [1.0])
        latency = own.pop(0) if len(own) > 1 else own[0]
        return scored(forms[model.name][1], latencies_ms=[latency] * 20)

    monkeypatch.setattr("distillery.export.ladder.run_in_process", run_in_process)
    monkeypatch.setattr("distillery.export.ladder.score_model", score_model)
    return forms


def climbed(
    files: tuple[Path, Path],
    base: Path,
    out: Path,
    *forms: str,
    loss: float = 0.02,
    choose: Choose = "smallest",
    progress: ShowProgress = show_nothing,
) -> Ladder:
    recipe = ExportRecipe(
        ladder=tuple(FORMS[form] for form in forms), largest_loss=loss, choose=choose
    )
    float_student = ModelToScore(
        name="student", kind="transformers", folder=str(base), adapter="the-adapter"
    )
    return climb(
        float_student, recipe, PROMPT, *files, out, labels=base, threads=3, progress=progress
    )


def test_the_picked_folder_goes_on_and_the_table_beside_it(
    files: tuple[Path, Path],
    built: dict[str, tuple[int, str]],
    asked: list[Asked],
    tmp_path: Path,
    home: Path,
) -> None:
    built |= {
        "int4 rtn/32": (10, "A" * 15 + "B" * 5),
        "int8 rtn/32": (20, "A" * 20),
        "fp16": (40, "A" * 20),
    }
    out = tmp_path / "out"
    # A stage's folder is there before its work.
    out.mkdir()
    found = climbed(files, tmp_path, out, "fp16", "rtn", "int8", loss=0.1)
    assert (out / "form.txt").read_text() == "int8 rtn/32"
    assert [(rung.form.title, rung.picked, rung.note) for rung in found.rungs] == [
        ("fp16", False, "no smaller"),
        ("int4 rtn/32", False, "loses more"),
        ("int8 rtn/32", True, "picked"),
    ]
    assert (found.rows, found.accuracy, found.largest_loss) == (20, 1.0, 0.1)
    written = Ladder.model_validate_json((out / LADDER_FILE).read_text())
    assert written == without_speeds(found)
    assert list((home / "work").iterdir()) == []
    # A folder that can't be picked any more is removed at once, and nothing is timed in turns.
    assert asked == [
        ("fp16", {"fp16"}),
        ("int4 rtn/32", {"fp16", "int4 rtn/32"}),
        ("int8 rtn/32", {"fp16", "int8 rtn/32"}),
    ]


def without_speeds(ladder: Ladder) -> Ladder:
    """What of a ladder is the same in equal runs."""
    rungs = [
        rung.model_copy(update={"p50_ms": None, "rows_per_second": None}) for rung in ladder.rungs
    ]
    return ladder.model_copy(update={"machine": "", "reason": "", "rungs": tuple(rungs)})


def test_a_form_that_can_not_be_timed_again_keeps_its_first_speed(
    files: tuple[Path, Path],
    built: dict[str, tuple[int, str]],
    latencies: dict[str, list[float]],
    tmp_path: Path,
    tiny_model: TinyModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built |= {"int4 rtn/32": (10, "A" * 20), "int8 rtn/32": (20, "A" * 20)}
    latencies |= {"int4 rtn/32": [9.0], "int8 rtn/32": [8.0, 2.0]}
    score: Callable[..., Scored] = vars(ladder)["score_model"]
    times: Counter[str] = Counter()

    def fails_in_the_second_round(model: ModelToScore, *given: Any, **more: Any) -> Scored:
        times[model.name] += 1
        # The first time, the rows choose; then come the rounds.
        if model.name == "int8 rtn/32" and times[model.name] == 3:
            raise OutOfResources("int8 rtn/32: killed")
        return score(model, *given, **more)

    monkeypatch.setattr(ladder, "score_model", fails_in_the_second_round)
    found = climbed(files, tiny_model("llama"), tmp_path / "out", "rtn", "int8", choose="fastest")
    assert [rung.p50_ms for rung in found.rungs] == [9.0, 8.0]
    assert times["int4 rtn/32"] == 4
    assert (tmp_path / "out" / "form.txt").read_text() == "int8 rtn/32"


def test_forms_that_may_be_the_fastest_are_timed_in_turns(
    files: tuple[Path, Path],
    built: dict[str, tuple[int, str]],
    asked: list[Asked],
    latencies: dict[str, list[float]],
    tmp_path: Path,
    tiny_model: TinyModel,
) -> None:
    """gptq was the slowest when it was scored, and in one round: other work was to blame."""
    built |= {
        "fp16": (40, "A" * 20),
        "int4 rtn/32": (10, "A" * 12 + "B" * 8),
        "int8 rtn/32": (20, "A" * 20),
        "int4 gptq/32": (11, "A" * 20),
    }
    latencies |= {"int8 rtn/32": [8.0], "int4 gptq/32": [99.0, 5.0, 99.0, 4.0], "fp16": [30.0]}
    shown: list[tuple[int, int, str]] = []
    found = climbed(
        files,
        tiny_model("llama"),
        tmp_path / "out",
        *("fp16", "rtn", "int8", "gptq"),
        choose="fastest",
        progress=lambda *told: shown.append(told),
    )
    turns = ["fp16", "int8 rtn/32", "int4 gptq/32"]
    assert [form for form, _ in asked[4:]] == [*turns, *reversed(turns), *turns]
    assert all(there == set(turns) for _, there in asked[4:]), "a form that loses more is gone"
    assert shown[-1] == (4, 4, "speeds, round 3 of 3, int4 gptq/32: 7 of 20 rows")
    assert [(rung.p50_ms, rung.note) for rung in found.rungs] == [
        (30.0, "no faster"),
        # It is not asked again, as it can't be picked.
        (1.0, "loses more"),
        (8.0, "no faster"),
        (5.0, "picked"),
    ]
    speeds = [rung.rows_per_second for rung in found.rungs]
    assert speeds == pytest.approx([1000 / 30, 1000, 125, 200])
    assert (tmp_path / "out" / "form.txt").read_text() == "int4 gptq/32"
    assert found.reason == "the fastest of 3 forms that keep to the loss"
    assert (found.choose, found.machine) == ("fastest", machine_name())
    written = json.loads((tmp_path / "out" / LADDER_FILE).read_text())
    assert written["choose"] == "fastest"
    assert not {"reason", "machine"} & written.keys(), "equal runs leave equal files"
    assert not {"p50_ms", "rows_per_second"} & written["rungs"][0].keys()


def test_a_form_without_a_rival_is_timed_once_and_floats_are_not_built_for_speed(
    files: tuple[Path, Path],
    built: dict[str, tuple[int, str]],
    asked: list[Asked],
    tmp_path: Path,
) -> None:
    built |= {"int8 rtn/32": (20, "A" * 20), "fp16": (40, "A" * 20)}
    found = climbed(files, tmp_path, tmp_path / "out", "int8", "fp16", choose="fastest")
    assert [rung.note for rung in found.rungs] == [
        "picked",
        "not built: a quantised form keeps to the loss",
    ]
    assert [form for form, _ in asked] == ["int8 rtn/32"]


def test_bounds_that_no_form_keeps_to_end_the_run(
    files: tuple[Path, Path],
    built: dict[str, tuple[int, str]],
    latencies: dict[str, list[float]],
    tmp_path: Path,
) -> None:
    built |= {"int8 rtn/32": (20, "A" * 20), "int4 rtn/32": (10, "A" * 20)}
    latencies["int8 rtn/32"] = [0.9]
    bounds = ExportBounds(latency_ms=0.5, bytes=30)
    said = r"is within {latency_ms: 0\.5, bytes: 30}; the nearest is int8"
    with pytest.raises(ExportError, match=said):
        climbed(files, tmp_path, tmp_path / "out", "rtn", "int8", choose=bounds)
    assert not (tmp_path / "out").exists()


def test_floats_are_built_only_if_nothing_before_them_keeps_to_the_loss(
    files: tuple[Path, Path], built: dict[str, tuple[int, str]], tmp_path: Path
) -> None:
    # The forms that stand here are all that can be built.
    built["int8 rtn/32"] = (20, "A" * 20)
    found = climbed(files, tmp_path, tmp_path / "out", "int8", "fp16")
    assert [rung.note for rung in found.rungs] == [
        "picked",
        "not built: a quantised form keeps to the loss",
    ]
    built |= {"int8 rtn/32": (20, "A" * 12 + "B" * 8), "fp16": (40, "A" * 20)}
    found = climbed(files, tmp_path, tmp_path / "again", "int8", "fp16")
    assert [rung.note for rung in found.rungs] == ["loses more", "picked"]


def test_a_smaller_form_behind_a_float_that_is_not_built_is_tried(
    files: tuple[Path, Path], built: dict[str, tuple[int, str]], tmp_path: Path
) -> None:
    built |= {"int8 rtn/32": (20, "A" * 20), "int4 rtn/32": (10, "A" * 20)}
    found = climbed(files, tmp_path, tmp_path / "out", "int8", "fp16", "rtn")
    assert [(rung.form.title, rung.note) for rung in found.rungs] == [
        ("int8 rtn/32", "no smaller"),
        ("fp16", "not built: a quantised form keeps to the loss"),
        ("int4 rtn/32", "picked"),
    ]


def test_training_rows_with_their_labels_choose_too(
    files: tuple[Path, Path],
    built: dict[str, tuple[int, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    labels = {}
    for number in range(5, 105):
        name = f"t{number}"
        labels[name] = TeacherLabel(example_id=name, answer="B", references=("C",))
    monkeypatch.setattr("distillery.export.ladder.read_labels", lambda _folder: labels)
    built["int8 rtn/32"] = (20, "A" * 20 + "B" * 49 + "A")

    def score_model(model: ModelToScore, rows: Path, *_rest: Any, **_more: Any) -> Scored:
        examples = read_examples(rows)
        assert [example.example_id for example in examples][19:22] == ["v19", "t5", "t6"]
        assert {example.references for example in examples[20:]} == {("C",)}
        if model.kind == "transformers":
            return scored("".join(str(example.answer_key) for example in examples))
        return scored(built[model.name][1])

    monkeypatch.setattr("distillery.export.ladder.score_model", score_model)
    recipe = ExportRecipe(ladder=(FORMS["int8"],), training_rows=50)
    student = ModelToScore(
        name="student", kind="transformers", folder=str(tmp_path), adapter="the-adapter"
    )
    found = climb(
        student, recipe, PROMPT, *files, tmp_path / "out", labels=tmp_path, progress=show_nothing
    )
    assert (found.rows, found.training_rows, found.accuracy) == (70, 50, 1.0)
    assert found.rungs[0].difference == pytest.approx(-1 / 70)
    assert "allows 2.0 points on 20 validation rows and 50 training rows" in render_ladder(found)


def test_a_rung_that_can_not_be_built_is_shown_with_the_reason(
    files: tuple[Path, Path],
    built: dict[str, tuple[int, str]],
    tmp_path: Path,
    tiny_model: TinyModel,
) -> None:
    built["int8 rtn/32"] = (20, "A" * 20)
    found = climbed(files, tiny_model("llama"), tmp_path / "out", "gptq", "int8")
    assert found.rungs[0] == Rung(
        form=FORMS["gptq"], note="left out: no time", out_of_resources=True
    )
    assert found.rungs[1].picked
    assert not found.is_final
    assert climbed(files, tmp_path, tmp_path / "again", "int8").is_final


def test_the_rung_under_way_is_shown_with_its_pass_or_its_rows(
    files: tuple[Path, Path], built: dict[str, tuple[int, str]], tmp_path: Path
) -> None:
    built["int8 rtn/32"] = (20, "A" * 20)
    shown = []
    out = tmp_path / "out"
    climbed(files, tmp_path, out, "rtn", "int8", progress=lambda *told: shown.append(told))
    assert shown == [
        (0, 2, "float student: 7 of 20 rows"),
        (0, 2, "rung 1 of 2, int4 rtn/32: pass 2 of 2, build"),
        (1, 2, "rung 2 of 2, int8 rtn/32: pass 2 of 2, build"),
        (1, 2, "rung 2 of 2, int8 rtn/32: 7 of 20 rows"),
    ]


def test_gptq_looks_at_the_training_rows_own_prompts(
    files: tuple[Path, Path],
    built: dict[str, tuple[int, str]],
    tmp_path: Path,
    tiny_model: TinyModel,
) -> None:
    built["int4 gptq/32"] = (10, "A" * 20)
    climbed(files, tiny_model("llama"), tmp_path / "out", "gptq")
    prompts = [
        json.loads(line) for line in (tmp_path / "out" / "prompts.jsonl").read_text().splitlines()
    ]
    assert len(prompts) == CALIBRATION_PROMPTS
    tokenizer = TransformersTokenizer(load_tokenizer(tiny_model("llama")))
    first = Example.model_validate_json(files[1].read_text().splitlines()[0])
    assert prompts[0] == render_ids(first, PROMPT, tokenizer)


def test_a_ladder_of_which_no_rung_keeps_to_the_loss_ends_the_run(
    files: tuple[Path, Path], built: dict[str, tuple[int, str]], tmp_path: Path
) -> None:
    built |= {"int4 rtn/32": (10, "A" * 12 + "B" * 8), "int8 rtn/32": (20, "A" * 18 + "B" * 2)}
    with pytest.raises(ExportError) as caught:
        climbed(files, tmp_path, tmp_path / "out", "rtn", "int8")
    text = str(caught.value)
    assert text.startswith(
        "export.largest_loss: no rung keeps to 2.0 points on 20 validation rows; the least loss is"
    )
    assert "int8 rtn/32: 0.0 MB, 1000.0 rows/s (p50 1.0 ms), -10.0 points [" in text
    assert not (tmp_path / "out").exists()


def test_a_ladder_of_which_no_rung_can_be_built_gives_the_reason(
    files: tuple[Path, Path], built: dict[str, tuple[int, str]], tmp_path: Path
) -> None:
    with pytest.raises(
        ExportError, match=r"no rung could be built; int4 rtn/32: left out: no time"
    ):
        climbed(files, tmp_path, tmp_path / "out", "rtn", "int8")


def test_validation_rows_need_gold_answers(files: tuple[Path, Path], tmp_path: Path) -> None:
    unanswered = VALIDATION[0].model_copy(update={"answer_key": None})
    files[0].write_text(unanswered.model_dump_json() + "\n")
    with pytest.raises(DataError, match="row v0 has no gold answer; validation rows need one"):
        climbed(files, tmp_path, tmp_path / "out", "rtn")


# Real ladders


def rows(split: str, count: int) -> list[Example]:
    made = [row(split, number) for number in range(count)]
    return [
        Example(
            example_id=one["id"],
            question=one["question"],
            choices=tuple(one["choices"]["text"]),
            answer_key=one["answerKey"],
        )
        for one in made
    ]


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build and score here: a tiny model's processes spend most of their time on imports."""

    def build_here(_module: str, job: BuildingJob, _limit_s: float, progress: ShowProgress) -> str:
        return build(job, progress).model_dump_json()

    def score_here(_module: str, job: ScoringJob, progress: ShowProgress) -> str:
        return score(job, progress).model_dump_json()

    monkeypatch.setattr("distillery.export.ladder.run_in_process", build_here)
    monkeypatch.setattr("distillery.evaluation.scoring.run_in_process", score_here)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("arch", ["llama", "phi3"])
def test_a_real_ladder_merged_and_apart(tiny_model: TinyModel, tmp_path: Path, arch: str) -> None:
    base = tiny_model(arch)
    tokenizer = load_tokenizer(base)
    trained, _ = training_rows(
        rows("train", 120), gold_labels(rows("train", 120)), PROMPT, tokenizer
    )
    recipe = TrainingRecipe(method="lora", epochs=8, learning_rate=5e-3)
    fine_tune(base, None, trained, [], recipe, tmp_path / "trained")
    model, adapter = model_and_adapter(tmp_path / "trained", base)
    for split in ("validation", "train"):
        (tmp_path / f"{split}.jsonl").write_text(
            "".join(f"{one.model_dump_json()}\n" for one in rows(split, 60))
        )

    # Floats first: after a quantised form that keeps to the loss, they are not built.
    forms = [ExportForm(precision="fp32"), ExportForm(precision="fp16", adapter_apart=True)]
    forms += [ExportForm(precision="fp16")] if arch == "llama" else []
    forms += [ExportForm(algorithm=algorithm) for algorithm in ("rtn", "k_quant_mixed", "gptq")]
    # Each rung takes ten seconds; what phi3 fuses does not concern the others.
    if arch == "llama":
        forms.append(ExportForm(precision="int8", algorithm="rtn"))
        forms.append(ExportForm(algorithm="rtn", adapter_apart=True))
        forms.append(ExportForm(algorithm="rtn", block_size=64, share_embeddings=False))
    found = climb(
        ModelToScore(name="student", kind="transformers", folder=str(model), adapter=str(adapter)),
        ExportRecipe(ladder=tuple(forms), largest_loss=1.0, choose="smallest"),
        PROMPT,
        tmp_path / "validation.jsonl",
        tmp_path / "train.jsonl",
        tmp_path / "out",
        threads=1,
    )
    by_title = {rung.form.title: rung for rung in found.rungs}
    assert [rung.note for rung in found.rungs if rung.bytes is None] == [], render_ladder(found)
    assert found.accuracy > 0.6, "a student that has learnt nothing has nothing to lose"
    apart: dict[str, float] = {}
    for title, form in by_title.items():
        if form.departure:
            assert form.departure.mean is not None
            apart[title] = form.departure.mean
    assert apart["fp32"] < 1e-4
    assert apart["fp16, apart"] < 0.01
    assert by_title["fp32"].difference == 0
    size = {title: rung.bytes or 0 for title, rung in by_title.items()}
    assert size["int4 rtn/32"] < size["fp32"]
    if arch == "llama":
        assert apart["fp16"] < 0.01
        assert apart["int8 rtn/32"] < apart["int4 rtn/32"]
        assert size["int4 rtn/32"] < size["int8 rtn/32"] < size["fp16"] < size["fp32"]
    picked = next(rung for rung in found.rungs if rung.picked)
    assert picked.bytes == min(size.values())
    ask_once(tmp_path / "out")
    written = Ladder.model_validate_json((tmp_path / "out" / LADDER_FILE).read_text())
    assert written == without_speeds(found)
    assert all(rung.rows_per_second for rung in found.rungs)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_of_real_forms_the_fastest_goes_on(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forms are built and asked; only what their rows take is made up."""
    took = {"int4 rtn/32": 5.0, "int8 rtn/32": 2.0}

    def score_slowly(model: ModelToScore, *given: Any, **more: Any) -> Scored:
        found = score_model(model, *given, **more)
        latencies = (took.get(model.name, 50.0),) * len(found.latencies_ms)
        return found.model_copy(update={"latencies_ms": latencies})

    monkeypatch.setattr("distillery.export.ladder.score_model", score_slowly)
    (tmp_path / "validation.jsonl").write_text(
        "".join(f"{one.model_dump_json()}\n" for one in rows("validation", 60))
    )
    found = climb(
        ModelToScore(name="student", kind="transformers", folder=str(tiny_model("llama"))),
        ExportRecipe(ladder=(FORMS["rtn"], FORMS["int8"]), largest_loss=1.0),
        PROMPT,
        tmp_path / "validation.jsonl",
        None,
        tmp_path / "out",
        threads=1,
    )
    assert [(rung.p50_ms, rung.note) for rung in found.rungs] == [
        (5.0, "no faster"),
        (2.0, "picked"),
    ]
    small, fast = (rung.bytes or 0 for rung in found.rungs)
    assert small < fast
    ask_once(tmp_path / "out")


@pytest.mark.slow
def test_a_rung_that_takes_too_long_is_left_out(
    tiny_model: TinyModel, tmp_path: Path, home: Path
) -> None:
    (tmp_path / "validation.jsonl").write_text(VALIDATION[0].model_dump_json() + "\n")
    recipe = ExportRecipe(ladder=(FORMS["rtn"],), rung_minutes=0.02)
    base = ModelToScore(name="student", kind="transformers", folder=str(tiny_model("llama")))
    with pytest.raises(ExportError, match=r"left out: it did not finish within 0\.02 minutes"):
        climb(base, recipe, PROMPT, tmp_path / "validation.jsonl", None, tmp_path / "out")
    assert list((home / "work").iterdir()) == []

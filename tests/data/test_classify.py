"""Preparation of rows of a text and a label: classes, empty labels, further columns, copies."""

import json
from pathlib import Path
from typing import Any

import pytest
from row_files import write

from distillery.data.classes import with_labels
from distillery.data.examples import read_examples
from distillery.data.prepare import PreparedCounts, check_rows, prepare
from distillery.errors import DataError, RecipeError
from distillery.prompts import render_messages
from distillery.recipe import DatasetRecipe, PromptRecipe, Recipe, TaskRecipe, parse_recipe
from distillery.records import CLASSES_FILE, Example

LABELS = ("refund", "delivery", "invoice")
ITEMS = ("router", "cable", "modem", "parcel", "socket", "voucher", "meter", "antenna", "battery")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def row(number: int, label: Any = "", **columns: Any) -> dict[str, Any]:
    """A row whose text no other number's resembles."""
    words = [ITEMS[number // 9**place % 9] for place in range(4)]
    return {"text": f"my {' '.join(words)} number {number}", "label": label, **columns}


def labelled(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [row(number, LABELS[number % 3]) for number in range(start, start + count)]


def recipe_of(name: str, test: str | None = None, labels: Any = None, **dataset: Any) -> Recipe:
    """A recipe as users write it, of a file, of which 0.3 are carved for test unless `test` names
    another file."""
    files, splits, carve = {"train": [name]}, {"train": "train"}, {"test": 0.3}
    if test:
        files["test"] = [test]
        splits["test"] = "test"
        carve = {}
    values = {"source": "files", "files": files, "splits": splits, "carve": carve} | dataset
    return parse_recipe(
        {"dataset": values, "task": {"kind": "classify", "labels": labels}}, "recipe.yaml"
    )


def prepared(recipe: Recipe, out: str = "out") -> tuple[PreparedCounts, dict[str, list[Example]]]:
    counts = prepare(recipe.dataset, Path(out), recipe.task)
    return counts, {role: read_examples(Path(out) / f"{role}.jsonl") for role in counts.splits}


def refusal(recipe: Recipe) -> str:
    """Return the one line that refuses the rows; nothing is written then."""
    with pytest.raises(DataError) as caught:
        prepare(recipe.dataset, Path("refused"), recipe.task)
    assert "\n" not in str(caught.value)
    assert not Path("refused").exists()
    return str(caught.value)


def test_csv_jsonl_and_parquet_give_the_same_rows_and_classes() -> None:
    rows = [*labelled(30), *(row(number) for number in range(30, 60))]
    found = []
    for name in ("rows.jsonl", "rows.csv", "rows.parquet"):
        counts, splits = prepared(recipe_of(write(rows, name)), name.replace(".", "-"))
        found.append((counts, splits))
        assert counts.classes == ("delivery", "invoice", "refund")
        assert json.loads(Path(name.replace(".", "-"), CLASSES_FILE).read_text()) == list(
            counts.classes
        )
    assert found[0] == found[1] == found[2]
    for examples in found[0][1].values():
        for example in examples:
            number = int(example.question.rsplit(" ", 1)[1])
            expected = LABELS[number % 3] if number < 30 else None
            assert (example.answer_key, example.keys) == (expected, counts.classes)
            assert "classes" not in json.loads(example.model_dump_json())


def test_rows_without_a_label_stay_in_train_and_shares_are_of_the_others() -> None:
    answered = [row(number, LABELS[number % 3]) for number in range(200)]
    bare = [row(number) for number in range(200, 800)]
    carve = {"gold": 0.5, "validation": 0.2, "test": 0.3}
    counts, splits = prepared(recipe_of(write([*answered, *bare]), carve=carve))
    assert len(splits["train"]) == 600
    assert all(example.answer_key is None for example in splits["train"])
    for role, share in carve.items():
        assert counts.splits[role].rows == pytest.approx(200 * share, abs=30), role
        assert all(example.answer_key for example in splits[role])
    alone, _ = prepared(recipe_of(write(answered + bare[:1]), carve=carve), "alone")
    for role in carve:
        assert alone.splits[role] == counts.splits[role], "unlabelled rows move no labelled one"


def test_a_copy_without_a_label_of_a_test_row_is_dropped() -> None:
    """Files are often filled in from a longer one that has the same texts without labels."""
    rows = labelled(60)
    copies = [{**values, "label": ""} for values in rows]
    counts, splits = prepared(recipe_of(write([*rows, *copies])))
    assert sum(len(examples) for examples in splits.values()) == 60
    assert counts.duplicates_dropped == 60
    assert all(example.answer_key for example in splits["train"])
    alone, _ = prepared(recipe_of(write(rows)), "alone")
    assert alone.splits == counts.splits


def test_a_text_of_another_file_that_is_a_test_row_is_a_leak() -> None:
    test = write(labelled(9), "test.jsonl")
    train = write([*labelled(20, 9), {**labelled(9)[4], "label": ""}], "train.jsonl")
    said = refusal(recipe_of(train, test))
    assert said.startswith("train.jsonl:21: a row of train may not stand in validation or test too")
    assert "train.jsonl:21 = test.jsonl:5" in said


def test_near_duplicates_and_copies_are_dropped() -> None:
    test = write(labelled(9), "test.jsonl")
    nearly = {"text": labelled(9)[4]["text"] + " Please!", "label": "refund"}
    train = [*labelled(20, 9), nearly, {**labelled(20, 9)[0], "label": ""}]
    counts, splits = prepared(recipe_of(write(train), test, near_duplicate=0.7))
    assert len(splits["train"]) == 20
    assert (counts.duplicates_dropped, counts.near_duplicates_dropped) == (1, 1)
    assert all(example.answer_key for example in splits["train"]), "the answered copy stays"


@pytest.mark.parametrize("source", ["list", "file"])
def test_named_classes_keep_their_order_and_need_no_row(source: str) -> None:
    names = ["refund", "no such thing", "delivery", "invoice"]
    Path("labels.txt").write_text("\ufeffrefund\n\n no such thing \r\ndelivery\ninvoice")
    labels = names if source == "list" else "labels.txt"
    counts, splits = prepared(recipe_of(write(labelled(30)), labels=labels))
    assert counts.classes == tuple(names)
    assert splits["train"][0].keys == tuple(names)
    # What the cache key of the data set goes by: another file of the same name is another task.
    task = with_labels(TaskRecipe(kind="classify", labels=labels))
    assert task == TaskRecipe(kind="classify", labels=tuple(names))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.parquet"])
def test_a_row_of_a_wrong_label_is_named(name: str) -> None:
    write([*labelled(30), row(30, "refnd")], name)
    line = 32 if name.endswith("csv") else 31
    assert refusal(recipe_of(name, labels=list(LABELS))) == (
        f"{name}:{line}: label: 'refnd' is none of the 3 classes in task.labels; "
        "correct the row, or add the class there"
    )


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"text": " "}, "rows.jsonl:31: text: empty; fill it in or remove the row"),
        ({"text": None}, "rows.jsonl:31: text: missing; fill it in or remove the row"),
        ({"label": ["refund"]}, "rows.jsonl:31: label: list where text belongs; correct the row"),
    ],
)
def test_a_row_that_is_none_is_named(bad: dict[str, Any], said: str) -> None:
    assert refusal(recipe_of(write([*labelled(30), {**row(30, "refund"), **bad}]))) == said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("refund\ndelivery\nrefund\n", "labels.txt: the class 'refund' is named twice; remove one"),
        ("refund\n\n", "labels.txt: name at least two classes, none of them empty"),
        ("", "labels.txt: name at least two classes, none of them empty"),
        (b"\xff\xfe\xff", "labels.txt: can't be read as text (UnicodeDecodeError); "),
        (None, "labels.txt: can't be read as text (FileNotFoundError); correct task.labels"),
    ],
)
def test_a_file_of_classes_that_can_not_be_meant(text: str | bytes | None, said: str) -> None:
    if isinstance(text, str):
        Path("labels.txt").write_text(text)
    elif text:
        Path("labels.txt").write_bytes(text)
    assert refusal(recipe_of(write(labelled(30)), labels="labels.txt")).startswith(said)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["refund"], "labels: at least two classes are needed"),
        ([1, 2], r"task\.labels\.0: .*valid string"),
    ],
)
def test_a_list_of_classes_that_can_not_be_meant(labels: Any, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        recipe_of("rows.jsonl", labels=labels)


def test_labels_in_the_rows_must_be_two() -> None:
    said = refusal(recipe_of(write([row(number, "refund") for number in range(30)])))
    assert said == (
        "dataset: the column 'label' has 1 labels, and a classifier needs two or more; correct "
        "dataset.columns.answer, or label some rows"
    )
    assert "has 0 labels" in refusal(recipe_of(write([row(number) for number in range(30)])))


def test_a_test_row_without_a_label_is_named() -> None:
    test = write([*labelled(9), row(9)], "test.csv")
    said = refusal(recipe_of(write(labelled(20, 10)), test))
    assert said.startswith("test.csv:11: label: empty, but rows of test need an answer")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.parquet"])
def test_numbers_are_labels(name: str) -> None:
    rows = [row(number, number % 3) for number in range(40)]
    counts, splits = prepared(recipe_of(write(rows, name)))
    assert counts.classes == ("0", "1", "2")
    for example in splits["train"]:
        assert example.answer_key == str(int(example.question.rsplit(" ", 1)[1]) % 3)
    named, _ = prepared(recipe_of(name, labels=["2", "1", "0"]), "named")
    assert named.classes == ("2", "1", "0")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.parquet"])
def test_truth_values_are_labels(name: str) -> None:
    counts, _ = prepared(recipe_of(write([row(n, n % 2 == 0) for n in range(40)], name)))
    assert counts.classes == ("False", "True")


def test_hundreds_of_classes() -> None:
    names = [f"topic {number:03}" for number in range(300)]
    rows = [row(number, names[number % 300]) for number in range(900)]
    counts, splits = prepared(recipe_of(write(rows, "rows.csv")))
    assert counts.classes == tuple(names)
    assert splits["test"][0].keys == tuple(names)


def test_further_columns_are_shown() -> None:
    rows = [row(number, LABELS[number % 3], title=f"Title {number}") for number in range(40)]
    rows[3]["title"] = None
    rows[4]["title"] = "  "
    prompt = PromptRecipe(system="One of:\n{labels}", user="{title}: {text}", answer="class")
    _, splits = prepared(recipe_of(write(rows), fields=["title"]))
    shown = {}
    for example in [*splits["train"], *splits["test"]]:
        system, user = render_messages(example, prompt)
        assert system["content"] == "One of:\ndelivery\ninvoice\nrefund"
        shown[int(example.question.rsplit(" ", 1)[1])] = user["content"]
    assert shown[2] == f"Title 2: {rows[2]['text']}"
    assert shown[3] == f": {rows[3]['text']}"
    assert shown[4] == f": {rows[4]['text']}"


def test_columns_without_a_text_of_their_own_make_the_text() -> None:
    rows = []
    for number in range(40):
        text = row(number)["text"]
        rows.append({"title": f"About {number}", "body": text, "stars": 2.5, "label": number % 2})
    rows[7] |= {"title": "", "stars": None}
    fields: dict[str, Any] = {"fields": ["title", "stars", "body"], "columns": {"question": None}}
    _, splits = prepared(recipe_of(write(rows), **fields))
    texts = {example.question for example in [*splits["train"], *splits["test"]]}
    assert f"About 6\n2.5\n{rows[6]['body']}" in texts
    assert rows[7]["body"] in texts
    rows[9] |= {"title": " ", "stars": None, "body": None}
    assert refusal(recipe_of(write(rows), **fields)) == (
        "rows.jsonl:10: title, stars, body: all empty; fill one in or remove the row"
    )
    missing = {**fields, "fields": ["title", "summary"]}
    assert (
        "no column 'summary', only 'title', 'body', 'stars', 'label'; correct dataset.fields"
        in (refusal(recipe_of(write(rows, "rows.csv"), **missing)))
    )


def test_a_splits_digest_depends_on_the_classes() -> None:
    name = write(labelled(30))
    digests = []
    for number, labels in enumerate((list(LABELS), list(LABELS[::-1]), [*LABELS, "other"])):
        counts, _ = prepared(recipe_of(name, labels=labels), f"out-{number}")
        digests.append({split.sha256 for split in counts.splits.values()})
    assert not digests[0] & digests[1]
    assert not digests[0] & digests[2]
    assert Path("out-0/train.jsonl").read_bytes() == Path("out-1/train.jsonl").read_bytes()


@pytest.mark.parametrize("task", [None, TaskRecipe()])
def test_rows_of_choices_have_the_digests_of_earlier_versions(task: TaskRecipe | None) -> None:
    rows = []
    for number in range(30):
        rows.append(
            {
                "id": f"r{number}",
                "question": f"text number {number} of {number * 7 % 13}",
                "choices": ["a", "b", "c"],
                "answerKey": "ABC"[number % 3],
            }
        )
    dataset = DatasetRecipe.model_validate(
        {
            "source": "files",
            "files": {"train": [write(rows)]},
            "splits": {"train": "train"},
            "carve": {"test": 0.3},
        }
    )
    counts = prepare(dataset, Path("out"), task)
    assert {role: split.sha256 for role, split in counts.splits.items()} == {
        "train": "fa4417d147675fac432719456776a756c283fba21afbcdc48e8470cb86e6242d",
        "test": "70aa163f3cecd7d0511778395b29fb58c81990c5a4e85815c5f9ce0275fd930c",
    }
    assert not Path("out", CLASSES_FILE).exists()
    assert read_examples(Path("out/test.jsonl"))[0].keys == ("A", "B", "C")


def test_rows_are_checked_as_they_are_prepared() -> None:
    recipe = recipe_of(write([*labelled(30), row(30)]))
    counts, _ = prepared(recipe)
    assert check_rows(recipe.dataset, recipe.task) == {
        role: split.rows for role, split in counts.splits.items()
    }


def test_a_damaged_list_of_classes_is_named() -> None:
    prepared(recipe_of(write(labelled(30))))
    Path("out", CLASSES_FILE).write_text('["refund", 3')
    with pytest.raises(DataError, match=r"classes\.json: no list of classes; prepare the data set"):
        read_examples(Path("out/train.jsonl"))

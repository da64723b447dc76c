"""The rows of a labelling in parts, and the share of the pace that each part's process has."""

from collections import Counter

import pytest
from label_runs import PROMPT, example
from pydantic import ValidationError

from distillery.labels import parts as module
from distillery.labels.parts import count_of_parts, rows_of_part, share_of
from distillery.recipe import CascadeRecipe, JudgeRecipe, Recipe, TeacherRecipe
from distillery.records import Example


def teacher(**settings: object) -> TeacherRecipe:
    return TeacherRecipe.model_validate({"processes": 4, "concurrency": 64} | settings)


def cut(rows: list[Example], recipe: TeacherRecipe, parts: int) -> list[list[Example]]:
    return [list(rows_of_part(rows, PROMPT, recipe, part, parts)) for part in range(parts)]


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_each_row_is_in_one_part_and_parts_are_about_equal(parts: int) -> None:
    rows = [example(number) for number in range(2100)]
    found = cut(rows, teacher(), parts)
    assert Counter(row.example_id for part in found for row in part) == Counter(
        row.example_id for row in rows
    )
    for part in found:
        assert 0.8 < len(part) * parts / len(rows) < 1.2
        numbers = [int(row.example_id.removeprefix("row-")) for row in part]
        assert numbers == sorted(numbers)
    assert found == cut(rows, teacher(), parts)


def test_rows_with_equal_requests_are_in_one_part() -> None:
    """Also where the options of one are those of the other in another order."""
    rows = [example(number) for number in range(50)]
    twins = [row.model_copy(update={"example_id": f"{row.example_id}-twin"}) for row in rows]
    turned = [
        row.model_copy(
            update={"example_id": f"{row.example_id}-turned", "choices": ("two", "three", "one")}
        )
        for row in rows
    ]
    votes = {"orders": 3, "votes": 2}
    found = cut([*rows, *twins, *turned], teacher(answers=votes, temperature=1), 3)
    for part in found:
        names = Counter("-".join(row.example_id.split("-")[:2]) for row in part)
        assert set(names.values()) <= {3}


def test_so_many_parts_as_have_enough_to_do() -> None:
    least = module.CALLS_OF_A_PART
    assert count_of_parts(100 * least, teacher(), 4) == 4
    assert count_of_parts(3 * least, teacher(), 4) == 3
    assert count_of_parts(2 * least - 1, teacher(), 4) == 1
    assert count_of_parts(0, teacher(), 4) == 1
    assert count_of_parts(100 * least, teacher(concurrency=3), 4) == 3
    cascade = {"concurrency": 2}
    assert count_of_parts(100 * least, teacher(cascade=cascade), 4) == 2


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_the_shares_of_all_processes_are_the_whole_pace(parts: int) -> None:
    whole = teacher(cascade={"concurrency": 17}, requests_per_minute=600)
    shares = [share_of(whole, part, parts) for part in range(parts)]
    concurrency = [share.concurrency for share in shares]
    assert sum(concurrency) == whole.concurrency
    assert max(concurrency) - min(concurrency) <= 1
    cheap = [share.cheap for share in shares if share.cheap]
    assert sum(share.concurrency for share in cheap) == 17
    # Of the limits per minute each takes its part of what is left by those that are at work.
    assert {share.requests_per_minute for share in shares} == {600}
    assert all(each.shared_pace for each in [*shares, *cheap])
    # Answers are the same ones.
    assert {share.content_id for share in shares} == {whole.content_id}


def test_processes_are_for_the_teacher_itself_behind_an_endpoint() -> None:
    recipe = {"preset": "demo", "teacher": {"processes": 2}}
    with pytest.raises(ValidationError, match="processes: a teacher of kind local is no endpoint"):
        Recipe.model_validate(recipe)
    with pytest.raises(ValidationError, match="processes: belongs to the teacher itself"):
        CascadeRecipe.model_validate({"processes": 2})
    with pytest.raises(ValidationError, match="processes"):
        JudgeRecipe.model_validate({"processes": 2})


def test_the_number_of_processes_is_in_no_key() -> None:
    assert teacher().content_id == TeacherRecipe().content_id
    assert "processes" not in TeacherRecipe().model_dump()

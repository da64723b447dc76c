"""What is told of few rows."""

from distillery.data.few_rows import few_rows


def test_nothing_is_compared_where_that_tells_nothing() -> None:
    assert few_rows({"validation": 29, "test": 0}) == {
        "validation rows": "29 are few: they tell how good a model is to ±18 points only; use more "
        "validation rows",
        "test rows": "none; 100 tell how good a model is to ±10 points; use more test rows",
    }
    assert few_rows({"validation": 28})["validation rows"] == (
        "28 are few: they tell how good a model is to ±19 points only (30: ±18); use more "
        "validation rows"
    )
    assert few_rows({"validation": 30, "test": 100, "train": 0}) == {}

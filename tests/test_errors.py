"""An error's text as one line."""

import pytest

from distillery.errors import DataError, named_line, one_line


def test_a_cause_is_one_short_line() -> None:
    assert one_line(ValueError("a\n  b\tc\n")) == "a b c"
    assert one_line("said by a service\r\n") == "said by a service"
    assert one_line("x" * 200) == "x" * 200
    assert one_line("x" * 201) == "x" * 199 + "…"
    assert one_line("a" * 9, 4) == "aaa…"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (DataError("rows.csv: no row;\nadd one"), "rows.csv: no row; add one"),
        (KeyError("a"), "KeyError: 'a'"),
    ],
)
def test_only_an_error_of_a_library_is_named(error: Exception, line: str) -> None:
    assert named_line(error) == line
    assert len(named_line(DataError("x" * 999))) == 999, "what to do stands at a message's end"
    assert len(named_line(KeyError("x" * 999))) < 250

"""The picture of two models side by side."""

from pathlib import Path
from xml.etree import ElementTree

import pytest

from distillery.errors import DataError
from distillery.records import Interval
from distillery.registry.comparison import ModelComparison, Side
from distillery.report.comparison import draw_comparison

CLOUD = Side(
    title="azureml:mine version 3",
    correct=41,
    accuracy=0.82,
    interval=Interval(low=0.69, high=0.9),
    bytes=55_000_000,
    rows_per_second=59.3,
    calls=1481,
    cost=0.32,
    currency="EUR",
    training_minutes=4.1,
)
LOCAL = Side(
    title="local:mine version 1",
    correct=39,
    accuracy=0.78,
    interval=Interval(low=0.65, high=0.87),
    bytes=70_000_000,
    calls=1481,
)
FOUND = ModelComparison(
    rows=50,
    first=CLOUD,
    second=LOCAL,
    difference=0.04,
    interval=Interval(low=-0.05, high=0.13),
    p_value=0.6,
    flips=(),
    note="",
)


def test_a_picture_shows_accuracy_size_speed_and_cost(tmp_path: Path) -> None:
    file = tmp_path / "picture.svg"
    draw_comparison(FOUND, file)
    texts = [text.strip() for text in ElementTree.parse(file).getroot().itertext() if text.strip()]
    for shown in (
        "A: azureml:mine version 3",
        "B: local:mine version 1",
        "0.820",
        "+4.0 [-5.0, +13.0]",
        "55 MB",
        "70 MB",
        "59.3",
        "0.32 EUR",
        "4.1",
    ):
        assert texts.count(shown) == 1, shown
    assert texts.count("1,481") == 2
    assert texts.count("not known") == 3, "speed, price and training of the second"
    assert "milliseconds a row, median" not in texts, "known of neither"
    first = file.read_bytes()
    draw_comparison(FOUND, file)
    assert file.read_bytes() == first


def test_a_file_that_cannot_be_drawn_into_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x\.gif: name a file that ends in \.svg, \.png, \.pdf"):
        draw_comparison(FOUND, tmp_path / "x.gif")
    with pytest.raises(DataError, match=r"none/x\.png: its folder is not there"):
        draw_comparison(FOUND, tmp_path / "none" / "x.png")
    (tmp_path / "x.png").mkdir()
    with pytest.raises(DataError, match=r"x\.png: can't be written \(Is a directory"):
        draw_comparison(FOUND, tmp_path / "x.png")

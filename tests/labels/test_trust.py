import pytest

from distillery.errors import TeacherError
from distillery.labels.trust import leaning, refuse_collapsed, total_variation

GOLD = {"billing": 20, "delivery": 20, "returns": 20}


def test_the_distance_is_half_the_sum_of_the_differences_of_the_shares() -> None:
    assert total_variation({"a": 1, "b": 1}, {"a": 10, "b": 10}) == 0
    assert total_variation({"a": 3}, {"b": 5}) == 1
    assert total_variation({"a": 3, "b": 1}, {"a": 1, "b": 1}) == pytest.approx(0.25)


def test_labels_with_the_shares_of_the_gold_answers_are_trusted() -> None:
    refuse_collapsed({"billing": 300, "delivery": 350, "returns": 340}, GOLD, 0.5)
    refuse_collapsed({"billing": 900, "delivery": 50, "returns": 50}, GOLD, 1.0)


def test_labels_that_are_nearly_all_of_one_class_stop_the_run() -> None:
    with pytest.raises(TeacherError, match=r"98% of the labels are 'returns', but 33% of the gold"):
        refuse_collapsed({"billing": 10, "delivery": 10, "returns": 980}, GOLD, 1.0)
    # With two classes the distance is only a half.
    with pytest.raises(TeacherError, match="the student would learn one answer"):
        refuse_collapsed({"yes": 799}, {"yes": 10, "no": 10}, 1.0)


def test_one_class_that_is_nearly_all_of_the_gold_answers_too_is_no_collapse() -> None:
    refuse_collapsed({"fine": 990, "broken": 10}, {"fine": 97, "broken": 3}, 0.5)


def test_shares_far_from_the_gold_answers_stop_the_run() -> None:
    with pytest.raises(TeacherError, match=r"0\.57 from those of .* \(0\.5\)"):
        refuse_collapsed({"billing": 900, "delivery": 50, "returns": 50}, GOLD, 0.5)


def test_without_gold_answers_or_labels_there_is_nothing_to_compare() -> None:
    refuse_collapsed({"returns": 980}, {}, 0.5)
    refuse_collapsed({}, GOLD, 0.5)


def test_labels_that_lean_to_one_answer_are_told(caplog: pytest.LogCaptureFixture) -> None:
    gold = {key: 3 * count for key, count in GOLD.items()}
    told = leaning({"billing": 500, "delivery": 250, "returns": 250}, gold)
    assert told
    assert told.startswith("the labels lean to 'billing': 50% of them, but 33% of the gold answers")
    assert caplog.messages == [told]
    unknown = leaning({"billing": 400, "delivery": 300, "new": 300}, GOLD)
    assert unknown
    assert "lean to 'new': 30% of them, but 0% of" in unknown


def test_a_lean_that_is_small_or_may_be_chance_is_not_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    many = {key: 1000 * count for key, count in GOLD.items()}
    assert leaning({"billing": 4000, "delivery": 3000, "returns": 3000}, many) is None
    assert leaning({"billing": 50, "delivery": 25, "returns": 25}, GOLD) is None
    assert leaning({}, GOLD) is None
    assert leaning({"billing": 5}, {}) is None
    assert caplog.messages == []

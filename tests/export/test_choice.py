"""Which rung of a ladder is picked, by accuracy, size and speed, and what is said of it."""

import pytest
from made_rungs import FORMS, rung

from distillery.export.choice import candidates, keeps_to, pick, reason_for, refusal, with_verdicts
from distillery.recipe import Choose, ExportBounds
from distillery.records import Interval, Rung


@pytest.mark.parametrize(
    ("lost", "gained", "rows", "keeps"),
    [
        # Equal answers, of however few rows.
        (0, 0, 20, True),
        (0, 0, 100, True),
        # Within two points, and no loss is proven.
        (2, 0, 100, True),
        (5, 3, 100, True),
        # More than two points are lost, whether proven or not.
        (3, 0, 100, False),
        (1, 0, 20, False),
        (60, 20, 1000, False),
        # A loss that is proven: perhaps more than two points of it, or surely less.
        (15, 0, 1000, False),
        (150, 0, 10_000, True),
        # Better than the float student.
        (0, 10, 100, True),
    ],
)
def test_what_keeps_to_two_points(lost: int, gained: int, rows: int, keeps: bool) -> None:
    assert keeps_to(rung(lost, gained, rows), 0.02) is keeps


def test_the_limit_itself_is_allowed() -> None:
    assert keeps_to(
        Rung(form=FORMS["rtn"], difference=-0.29 + 0.27, interval=Interval(low=-0.1, high=0.1)),
        0.02,
    )
    assert keeps_to(
        Rung(form=FORMS["rtn"], difference=-0.01, interval=Interval(low=-0.02, high=-0.001)), 0.02
    )
    assert not keeps_to(
        Rung(form=FORMS["rtn"], difference=-0.021, interval=Interval(low=-0.1, high=0.1)), 0.02
    )
    assert not keeps_to(
        Rung(form=FORMS["rtn"], difference=-0.01, interval=Interval(low=-0.021, high=-0.001)), 0.02
    )


def test_of_those_that_keep_to_it_the_smallest_is_picked() -> None:
    too_lossy, large, small = (
        rung(9, 0, 100, size=1),
        rung(0, 0, 100, size=3),
        rung(1, 0, 100, size=2),
    )
    not_built = Rung(form=FORMS["gptq"], note="left out: no time")
    assert pick([too_lossy, large, not_built, small], 0.02, "smallest") == 3
    assert pick([too_lossy, large, not_built, small], 0.5, "smallest") == 0
    assert pick([too_lossy, not_built], 0.02, "smallest") is None
    assert pick([], 0.02, "smallest") is None


def test_of_two_as_small_the_one_that_loses_less_is_picked() -> None:
    assert (
        pick(
            [rung(1, 0, 100, size=2), rung(0, 0, 100, size=2), rung(0, 0, 100, size=2)],
            0.02,
            "smallest",
        )
        == 1
    )


def test_of_two_as_small_a_gain_wins_over_no_loss() -> None:
    assert pick([rung(0, 0, 100), rung(0, 1, 100)], 0.02, "smallest") == 1


def test_a_bound_at_zero_proves_no_loss_and_a_proven_one_may_be_larger_than_allowed() -> None:
    """A point estimate within the limit is not enough where the loss itself is proven."""
    small = rung(1, 0, 100, difference=-0.01)
    level = small.model_copy(update={"interval": Interval(low=-0.05, high=0.0)})
    proven = small.model_copy(update={"interval": Interval(low=-0.05, high=-0.002)})
    assert keeps_to(level, 0.02)
    assert not keeps_to(proven, 0.02)
    notes = [judged.note for judged in with_verdicts([level, proven, small], 0, 0.02, "smallest")]
    assert notes == ["picked", "may lose more", "no smaller"]


# By size and speed


def four_forms() -> list[Rung]:
    """A small slow form, a larger one of twice its speed, one of nearly that speed that is between
    them in size, and the fastest and smallest one, which loses too much."""
    return [
        rung(1, 0, 100, size=100, speed=40),
        rung(0, 0, 100, size=150, speed=82),
        rung(0, 0, 100, size=140, speed=80),
        rung(9, 0, 100, size=50, speed=200),
    ]


@pytest.mark.parametrize(
    ("choose", "picked"),
    [
        ("smallest", 0),
        # 80 rows a second are within 5 % of 82.
        ("fastest", 2),
        # The smallest within the latency, the fastest within the size.
        (ExportBounds(latency_ms=25), 0),
        (ExportBounds(latency_ms=20), 2),
        (ExportBounds(latency_ms=12.3), 1),
        (ExportBounds(bytes=150), 2),
        (ExportBounds(bytes=139), 0),
        (ExportBounds(latency_ms=25, bytes=150), 2),
        (ExportBounds(latency_ms=25, bytes=139), 0),
        (ExportBounds(latency_ms=12), None),
        (ExportBounds(bytes=99), None),
        (ExportBounds(latency_ms=24, bytes=139), None),
    ],
)
def test_what_is_picked_by_size_speed_and_bounds(choose: Choose, picked: int | None) -> None:
    assert pick(four_forms(), 0.02, choose) == picked


def test_speeds_that_differ_by_more_than_noise_decide() -> None:
    slow, fast = rung(0, 0, 100, size=1, speed=94.9), rung(0, 0, 100, size=2, speed=100)
    assert pick([slow, fast], 0.02, "fastest") == 1
    assert pick([slow.model_copy(update={"rows_per_second": 95.1}), fast], 0.02, "fastest") == 0
    # All within reach of the fastest are equals, also where they are apart from each other.
    slower = rung(1, 0, 100, size=1, speed=95.1)
    assert pick([slower, slower, rung(0, 0, 100, size=1, speed=96), fast], 0.02, "fastest") == 2


def test_one_more_form_is_judged_as_the_others_are() -> None:
    """A form at 1.5 times the smallest's size, of twice its speed, whatever it is."""
    forms = [rung(1, 0, 100, size=80, speed=75), rung(0, 0, 100, size=120, speed=145)]
    assert [pick(forms, 0.02, choose) for choose in ("smallest", "fastest")] == [0, 1]
    assert pick(list(reversed(forms)), 0.02, "fastest") == 0


def test_rungs_that_could_be_asked_no_row_have_no_speed() -> None:
    forms = [rung(0, 0, 100, size=2), rung(0, 0, 100, size=1)]
    assert pick(forms, 0.02, "fastest") == 1
    assert pick(forms, 0.02, ExportBounds(latency_ms=1000)) is None


@pytest.mark.parametrize(
    ("choose", "left"),
    [
        ("smallest", [0]),
        ("fastest", [0, 1, 2]),
        (ExportBounds(latency_ms=1), [0, 1, 2]),
        (ExportBounds(latency_ms=1, bytes=140), [0, 2]),
    ],
)
def test_who_may_be_picked_before_the_speeds_are_known(choose: Choose, left: list[int]) -> None:
    assert candidates(four_forms(), 0.02, choose) == left
    assert candidates([], 0.02, choose) == []


def test_why_a_rung_is_picked_is_said() -> None:
    forms = four_forms()
    assert reason_for(forms, 0.02, "fastest") == (
        "the smallest of 2 forms within 5 % of the fastest of 3 forms that keep to the loss"
    )
    assert reason_for(forms[:2], 0.02, "fastest") == "the fastest of 2 forms that keep to the loss"
    assert reason_for(forms, 0.02, "smallest") == "the smallest of 3 forms that keep to the loss"
    within_20_ms, within_139 = ExportBounds(latency_ms=20), ExportBounds(bytes=139)
    assert reason_for(forms, 0.02, within_20_ms) == (
        "the smallest of 2 forms that keep to the loss and the bounds"
    )
    assert reason_for(forms, 0.02, within_139) == "the only form to keep to the loss and the bounds"
    within_150 = ExportBounds(bytes=150, latency_ms=12.4)
    assert reason_for([*forms, forms[0]], 0.02, within_150).startswith("the only form")


def test_verdicts_say_by_what_a_form_lost() -> None:
    def notes(picked: int, choose: Choose) -> list[str]:
        return [judged.note for judged in with_verdicts(four_forms(), picked, 0.02, choose)]

    assert notes(2, "fastest") == ["no faster", "no faster", "picked", "loses more"]
    assert notes(0, "smallest") == ["picked", "no smaller", "no smaller", "loses more"]
    within_20_ms = ExportBounds(latency_ms=20)
    assert notes(2, within_20_ms) == ["out of bounds", "no smaller", "picked", "loses more"]
    within_140, within_150 = ExportBounds(bytes=140), ExportBounds(bytes=150)
    assert notes(2, within_140) == ["no faster", "out of bounds", "picked", "loses more"]
    assert notes(2, within_150) == ["no faster", "no faster", "picked", "loses more"]
    judged = with_verdicts(four_forms(), 2, 0.02, "fastest")
    assert [one.picked for one in judged] == [False, False, True, False]


def test_bounds_that_no_form_keeps_to_name_the_nearest() -> None:
    assert refusal(four_forms(), 0.02, ExportBounds(latency_ms=10), 100, 0) == (
        "export.choose: no rung that keeps to 2.0 points on 100 validation rows is within "
        "{latency_ms: 10}; the nearest is int4 rtn/32: 0.0 MB, 82.0 rows/s (p50 12.2 ms), +0.0 "
        "points [-3.2, +3.2]; allow more there, or add a rung"
    )
    # Twice too slow is nearer than three times too large.
    both = refusal(four_forms(), 0.02, ExportBounds(latency_ms=12.5, bytes=45), 100, 0)
    assert "within {latency_ms: 12.5, bytes: 45}; the nearest is int4 rtn/32: 0.0 MB, 40.0" in both
    # Where none keeps to the loss, the loss is what to mend.
    loses, most = four_forms()[3], rung(30, 0, 100, size=7_000_000)
    for choose in ("fastest", "smallest", ExportBounds(bytes=1)):
        lossy = refusal([most, loses, most], 0.02, choose, 100, 20)
        assert lossy.startswith(
            "export.largest_loss: no rung keeps to 2.0 points on 80 validation rows and 20 "
            "training rows; the least loss is that of int4 rtn/32: 0.0 MB, 200.0 rows/s"
        )
    left_out = Rung(form=FORMS["gptq"], note="left out: no time")
    assert refusal([left_out], 0.02, "fastest", 100, 0) == (
        "export.ladder: no rung could be built; int4 gptq/32: left out: no time"
    )

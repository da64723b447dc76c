"""The memory of data preparation does not grow with its rows."""

from pathlib import Path

import pytest

from benchmarks.scale_memory import measured, write_rows


@pytest.mark.slow
def test_four_times_the_rows_take_the_memory_of_one(tmp_path: Path) -> None:
    peaks = []
    for count in (20_000, 80_000):
        rows = tmp_path / f"{count}.jsonl"
        write_rows(rows, count)
        figures = measured("prepare", rows, tmp_path / f"out-{count}", count)
        # Many rows nearly repeat others, so that the search for near duplicates has work.
        assert 0.5 * count < figures["kept"] < 0.99 * count
        peaks.append(figures["peak_mib"])
    assert peaks[1] / peaks[0] < 1.1

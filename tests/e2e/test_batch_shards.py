"""Batch inference in shards over two real workers: the files of one process, and no row lost or
answered twice when a child, a worker and the parent die."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sharded_rows import ShardedRows, contents, write_rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

ROWS, SHARD_ROWS = 96, 4


@pytest.fixture(scope="module")
def sharded(
    tmp_path_factory: pytest.TempPathFactory, tiny_onnx: Callable[..., Path]
) -> Iterator[ShardedRows]:
    made = ShardedRows(tmp_path_factory.mktemp("sharded"), tiny_onnx("llama"))
    try:
        # The first worker has the parent and one child at a time, the second one all others.
        made.start(workers=1, limit=2)
        yield made
    finally:
        made.workshop.close()


def test_nothing_is_lost_and_nothing_answered_twice(sharded: ShardedRows, tmp_path: Path) -> None:
    workshop = sharded.workshop
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    out = tmp_path / "answers"
    with workshop.slower(row=0.5):
        run = sharded.start_run(rows, out, shard_rows=SHARD_ROWS, child_runs=3)
        # The parent and a child, before the second worker may take all children.
        workshop.until(
            run, "a child on the first worker", lambda: len(sharded.runs_of("cpu-0")) == 2
        )
        workshop.start_worker("cpu-pool", "cpu-1")
        sharded.kill(sharded.child_at_work(run, 1, "cpu-0"))
        sharded.child_at_work(run, 1, "cpu-1")
        sharded.kill_machine("cpu-1")
        sharded.child_at_work(run, answered=1)
        sharded.kill(run)
        workshop.ended(run)
    before = len(sharded.shards())
    assert 3 <= before < ROWS // SHARD_ROWS
    started = time.monotonic()
    again = sharded.start_run(rows, out, shard_rows=SHARD_ROWS)
    sharded.finished(again)
    print(f"\nafter the kills: {time.monotonic() - started:.1f} s for the rest")
    shards = sharded.shards()
    assert len(shards) == ROWS // SHARD_ROWS
    assert set(shards.values()) == {1}, "a shard was answered twice"
    workshop.wait_for_line(again, "shards from the cache")

    # One process, and two with a shard each, each time with a store of its own.
    for number, shard_rows in ((1, SHARD_ROWS), (2, ROWS // 2)):
        alone = tmp_path / f"alone-{number}"
        options = ("--shard-rows", str(shard_rows), "--processes", str(number))
        done = sharded.command(rows, alone, *options, home=tmp_path / f"home-{number}")
        assert done.returncode == 0, done.stderr[-3000:]
        assert contents(alone) == contents(out)
    lines = contents(out)
    assert len(lines["predictions.jsonl"].splitlines()) == ROWS - 1
    assert len(lines["failed.jsonl"].splitlines()) == 1

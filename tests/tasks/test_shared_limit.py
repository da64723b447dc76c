"""Runs that share a Prefect concurrency limit: their calls together stay within it."""

import asyncio
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from chat_endpoint import ChatEndpoint, good
from prefect import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from pydantic import SecretStr

from distillery.errors import TeacherError
from distillery.labels.files import LabelCounts
from distillery.labels.labelling import label
from distillery.labels.store import LabelStore
from distillery.recipe import PromptRecipe, TeacherRecipe
from distillery.records import Example
from distillery.teacher.endpoint import Endpoint
from tasks.labels import shared_slot

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect_api")]


async def run(server: ChatEndpoint, out: Path, name: str, limit: str) -> LabelCounts:
    rows = [
        Example(example_id=f"{name}-{n}", question=f"{name} {n}?", choices=("x", "y", "z"))
        for n in range(30)
    ]
    endpoint = Endpoint(server.url, "m", SecretStr("k"), name, "openai")
    with LabelStore(f"sqlite:///{out / name}.db") as store:
        recipe = TeacherRecipe(concurrency=8)
        return await label(
            rows,
            PromptRecipe(),
            recipe,
            endpoint,
            store,
            out / name,
            slots=partial(shared_slot, limit),
        )


def test_two_runs_together_keep_to_one_limit(tmp_path: Path) -> None:
    async def both(server: ChatEndpoint) -> list[LabelCounts]:
        async with get_client() as client:
            await client.create_global_concurrency_limit(
                GlobalConcurrencyLimitCreate(name="teacher", limit=3)
            )
        return await asyncio.gather(
            *(run(server, tmp_path, name, "teacher") for name in ("one", "two"))
        )

    with ChatEndpoint(lambda call: replace(good(call), delay=0.05)) as server:
        counts = asyncio.run(both(server))
        assert [one.accepted for one in counts] == [30, 30]
        assert server.most_in_flight <= 3


def test_a_limit_that_is_not_there_is_said_in_one_line(tmp_path: Path) -> None:
    with (
        ChatEndpoint() as server,
        pytest.raises(TeacherError, match="prefect gcl create nowhere --limit CALLS"),
    ):
        asyncio.run(run(server, tmp_path, "one", "nowhere"))
    assert server.calls == []

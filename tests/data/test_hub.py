"""What the hub's errors mean for data sets and base models: which may pass, and which not."""

from typing import Any

import datasets
import pytest
from chat_endpoint import ChatEndpoint, Reply

from distillery.data.hub import hub_commit, load_from_hub
from distillery.data.source import commit_in, source_identity
from distillery.errors import (
    INFRASTRUCTURE_ERRORS,
    DataError,
    DataUnavailable,
    ModelUnavailable,
    NoSuchRevision,
    TrainingUnavailable,
)
from distillery.models.base import base_folder, pin_revision
from distillery.recipe import BaseModelRecipe, DatasetRecipe

PASSING = [Reply({}, 429), Reply({}, 500), Reply({}, 503), Reply(reset=True), Reply(drop=True)]
LASTING = [Reply({}, 400), Reply({}, 403), Reply({}, 410)]


def ids(reply: Reply) -> str:
    return str(reply.status) if reply.body is not None else "cut off"


@pytest.mark.parametrize("reply", PASSING, ids=ids)
def test_an_outage_of_the_hub_is_worth_a_retry(
    reply: Reply, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = BaseModelRecipe(model="a/b")
    with ChatEndpoint(lambda _call: reply) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        with pytest.raises(DataUnavailable, match="the hub doesn't answer for a/d"):
            hub_commit("a/d", "v1")
        assert len(hub.calls) == 1
        with pytest.raises(ModelUnavailable, match=r"base\.model: can't get a/b"):
            pin_revision(base)
        with pytest.raises(ModelUnavailable, match=r"base\.model: can't get a/b"):
            base_folder(base)
        # A data set at a revision may be on this machine.
        dataset = DatasetRecipe(source="hub", name="a/d", revision="v1")
        assert source_identity(dataset) == "a/d@v1"
    assert {DataUnavailable, ModelUnavailable} < set(INFRASTRUCTURE_ERRORS)


@pytest.mark.parametrize("reply", LASTING, ids=ids)
def test_a_refusal_of_the_hub_is_not(reply: Reply, monkeypatch: pytest.MonkeyPatch) -> None:
    with ChatEndpoint(lambda _call: reply) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        with pytest.raises(DataError) as caught:
            hub_commit("a/d", None)
        assert not isinstance(caught.value, INFRASTRUCTURE_ERRORS)
        with pytest.raises(TrainingUnavailable) as refused:
            pin_revision(BaseModelRecipe(model="a/b"))
        assert not isinstance(refused.value, INFRASTRUCTURE_ERRORS)


def test_an_unknown_name_is_no_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = Reply({}, 404, {"X-Error-Code": "RepoNotFound"})
    with ChatEndpoint(lambda _call: unknown) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        with pytest.raises(NoSuchRevision):
            hub_commit("a/d", None)


def test_offline_by_choice_is_no_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError) as caught:
        hub_commit("a/d", None)
    assert type(caught.value) is DataError


def test_a_known_commit_is_not_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Any] = []

    def load_dataset(
        name: str, revision: str, cache_dir: str, trust_remote_code: bool
    ) -> dict[str, Any]:
        loaded.append((revision, cache_dir))
        return {}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with ChatEndpoint(lambda _call: Reply({"id": "a/d", "sha": "e" * 40})) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        load_from_hub("a/d", "v1")
        assert len(hub.calls) == 1
        load_from_hub("a/d", "v1", commit="f" * 40)
        assert len(hub.calls) == 1
    (asked, folder), (known, same_folder) = loaded
    assert (asked, known) == ("e" * 40, "f" * 40)
    assert folder == same_folder


@pytest.mark.parametrize(
    ("identity", "commit"),
    [
        (f"a/d@{'e' * 40}", "e" * 40),
        (f"other:{'0' * 64}+{'1' * 64}+a/d@{'e' * 40}", "e" * 40),
        ("a/d@v1", None),
        ("0" * 64, None),
    ],
)
def test_the_commit_in_a_sources_identity(identity: str, commit: str | None) -> None:
    assert commit_in(identity) == commit

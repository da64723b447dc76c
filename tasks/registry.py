import logging
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from tenacity import (
    before_sleep_log,
    retry,
    retry_if_exception_type,
    stop_after_attempt,
    wait_chain,
    wait_fixed,
)

from distillery import __version__
from distillery.errors import RegistryUnavailable
from distillery.evaluation import gate as domain
from distillery.evaluation.report import ANSWERS_FILE, candidate_of
from distillery.recipe import GateRule, RegistryRecipe
from distillery.records import EvaluationReport, GateDecision, OnnxModel, RegisteredModel
from distillery.registry.manifest import MANIFEST
from distillery.registry.open import open_registry
from distillery.settings import LocalSettings
from distillery.storage.artifacts import ArtifactStore
from distillery.storage.digests import digest_of_files, list_files
from distillery.storage.working import working_folder
from tasks.progress import conclude
from tasks.stage import origin, stage

ANSWERS = f"evaluation/{ANSWERS_FILE}"

# As a stage has it: a registry that is away for a moment ends no run after hours of training.
patiently = retry(
    retry=retry_if_exception_type(RegistryUnavailable),
    stop=stop_after_attempt(3),
    wait=wait_chain(wait_fixed(10), wait_fixed(60)),
    before_sleep=before_sleep_log(logging.getLogger("distillery"), logging.WARNING),
    reraise=True,
)


@stage("register", version=1)
def register(
    model: OnnxModel, report: EvaluationReport, recipe: RegistryRecipe, provenance: dict[str, Any]
) -> RegisteredModel:
    """Register the model with the record of how it came to be."""
    started = time.perf_counter()
    store = ArtifactStore()
    registry = open_registry(recipe)
    with working_folder("register") as folder:
        content = _with_answers(store, model, report, folder)
        digest = digest_of_files(list_files(content))
        # The same model is the same version, though another run's figures of time stand beside it.
        same = (m for m in registry.list(recipe.model_name) if m.artifact.sha256 == digest)
        known = next((m for m in same if registry.is_whole(m)), None)
        tags = {
            "precision": model.precision,
            "accuracy": f"{report.row(report.candidate).accuracy:.4f}",
        }
        facts = {**_plain(provenance), "distillery": __version__}
        if registry.kind == "local":
            # Machines that share the registry share this store, and not the registry's own folder.
            store.put(content)
        registered = known or registry.register(content, recipe.model_name, tags, facts)
    conclude(f"{registered.name} version {registered.version}")
    return registered.model_copy(update=origin(started))


@patiently
def promote(model: RegisteredModel) -> None:
    """Make the model the champion. Not cached: another run may have promoted another one since."""
    open_registry(RegistryRecipe(kind=model.registry, model_name=model.name)).promote(model)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value.model_dump(mode="json") if isinstance(value, BaseModel) else value
        for key, value in values.items()
    }


def _with_answers(
    store: ArtifactStore, model: OnnxModel, report: EvaluationReport, folder: Path
) -> Path:
    """Return a copy of the model's folder with the candidate's answers, for the next gate's
    comparison."""
    content = folder / "model"
    shutil.copytree(store.fetch(model.artifact), content)
    (content / ANSWERS).parent.mkdir()
    shutil.copyfile(store.fetch(report.artifact) / ANSWERS_FILE, content / ANSWERS)
    return content


@patiently
def judge(
    report: EvaluationReport, rules: Sequence[GateRule], recipe: RegistryRecipe
) -> GateDecision:
    """Apply the gate's rules: to the candidate's figures and answers, and to the champion's answers
    on shared rows.

    Not cached: the registry may have changed since the last run."""
    registry = open_registry(recipe)
    answers = ArtifactStore().fetch(report.artifact) / ANSWERS_FILE
    champion = next((m for m in registry.list(recipe.model_name) if m.role == "champion"), None)
    if champion is None:
        return domain.gate(report.scoreboard, report.candidate, rules=rules, answers=answers)
    with working_folder("champion") as folder:
        theirs = registry.download(champion, folder / "model") / ANSWERS
        decision = domain.gate(
            report.scoreboard,
            report.candidate,
            rules=rules,
            answers=answers,
            champion_answers=theirs,
            champion=f"{champion.name} version {champion.version}",
            champion_candidate=candidate_of(theirs),
        )
        # The run's page shows what has changed since the champion.
        (folder / "answers").mkdir()
        shutil.copyfile(theirs, folder / "answers" / ANSWERS_FILE)
        kept = ArtifactStore().put(folder / "answers")
        return decision.model_copy(update={"champion_answers": kept})


@stage("download", version=1)
def download(model: RegisteredModel, described: OnnxModel) -> OnnxModel:
    """Download a registered model, verify every file's sha256 and ask it one question.

    `described` is what was registered."""
    from distillery.export.build import ask_once

    started = time.perf_counter()
    registry = open_registry(RegistryRecipe(kind=model.registry, model_name=model.name))
    downloads = LocalSettings().folder / "downloads" / model.name
    target = downloads / f"{model.version}-{model.manifest_sha256[:12]}"
    folder = registry.download(model, target)
    ask_once(folder)
    conclude(f"{model.name} version {model.version} verified in {folder}")
    with working_folder("download") as copy:
        # Without the registry's manifest, what is delivered has the digest of what was registered.
        shutil.copytree(folder, copy, dirs_exist_ok=True, ignore=lambda _folder, _names: [MANIFEST])
        artifact = ArtifactStore().put(copy)
    return described.model_copy(update={"artifact": artifact, **origin(started)})

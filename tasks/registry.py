import json
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from prefect.runtime import flow_run
from pydantic import BaseModel

from distillery.data.examples import read_examples
from distillery.errors import RegistryError, RegistryUnavailable
from distillery.evaluation import gate as domain
from distillery.evaluation.gate import EarlierVersion, share_rows
from distillery.evaluation.report import (
    ANSWERS_FILE,
    REGISTERED_ANSWERS,
    answer_rows,
    parse_answers,
    row_contents,
    rows_digest,
    write_own_answers,
    write_text,
)
from distillery.evaluation.scoring import ModelToScore, score_model
from distillery.recipe import METRIC_NAMES, GateRule, RegistryRecipe
from distillery.records import (
    Artifact,
    EvaluationReport,
    Example,
    GateDecision,
    OnnxModel,
    Promotion,
    RegisteredModel,
    Rows,
)
from distillery.registry.base import CHAMPION, REJECTED, Registry
from distillery.registry.card import write_card
from distillery.registry.history import Actor, taken_down
from distillery.registry.manifest import MANIFEST, environment, prompt_in
from distillery.registry.open import open_registry
from distillery.registry.signing import SIGNATURE
from distillery.settings import LocalSettings
from distillery.storage.artifacts import ArtifactStore
from distillery.storage.working import working_folder
from tasks.progress import conclude
from tasks.stage import origin, produced_by, stage, uncached

_log = logging.getLogger("distillery.registry")


@stage("register", version=2)
def register(
    model: OnnxModel,
    report: EvaluationReport,
    test: Rows,
    recipe: RegistryRecipe,
    provenance: dict[str, Any],
    refused: str | None = None,
) -> RegisteredModel:
    """Register the model with the record of how it came to be.

    `refused`: why the gate refuses it; it is registered as rejected then. What is registered holds
    the student's own answers to `test`, and nothing that the machine decides, so that the same
    student is the same version."""
    started = time.perf_counter()
    store = ArtifactStore()
    registry = open_registry(recipe)
    examples = _examples(store, test)
    with working_folder("register") as folder:
        content = folder / "model"
        shutil.copytree(store.fetch(model.artifact), content)
        (content / REGISTERED_ANSWERS).parent.mkdir()
        answers = store.fetch(report.artifact) / ANSWERS_FILE
        write_own_answers(answers, report.candidate, examples, content / REGISTERED_ANSWERS)
        facts = {**_plain(provenance), **environment(), "run": produced_by()}
        write_card(content, recipe.model_name, facts)
        if registry.kind == "local":
            # Machines that share the registry share this store, and not the registry's own folder.
            store.put(content)
        row = report.row(report.candidate)
        figure = f"{row.accuracy:.4f}"
        registered = registry.register(
            content,
            recipe.model_name,
            {"precision": model.precision, row.metric or "accuracy": figure},
            facts,
            actor=_actor(),
            reason=refused or f"{METRIC_NAMES[row.metric]} {figure} on {len(examples):,} test rows",
            rejected=refused is not None,
            model_sha256=model.artifact.sha256,
            rows_sha256=rows_digest(examples),
        )
    conclude(f"{registered.name} version {registered.version}")
    return registered.model_copy(update=origin(started))


@uncached("gate")
def apply_gate(
    report: EvaluationReport,
    model: OnnxModel,
    test: Rows,
    rules: Sequence[GateRule],
    recipe: RegistryRecipe,
) -> GateDecision:
    """Apply the gate's rules: to the candidate's figures and answers, and to the answers of the
    champion and of the versions that the rules name, on shared rows.

    A champion that has answered none of the `test` rows, because they are fresh, is asked them."""
    registry = open_registry(recipe)
    store = ArtifactStore()
    rows = store.fetch(test.artifact) / test.file
    contents = row_contents(read_examples(rows))
    earlier = []
    for version in earlier_versions(registry, recipe.model_name, rules, model):
        is_other_champion = version.is_champion and not version.is_candidate
        if is_other_champion and not share_rows(version.answers, contents):
            version = asked(registry, version, recipe.model_name, rows)
        earlier.append(version)
    decision = domain.gate(
        report.scoreboard,
        report.candidate,
        rules=rules,
        answers=store.fetch(report.artifact) / ANSWERS_FILE,
        contents=contents,
        earlier=earlier,
    )
    for version in earlier:
        if version.is_champion:
            # The run's page shows what has changed since the champion.
            kept = _kept_answers(store, version)
            decision = decision.model_copy(update={"champion_answers": kept})
    return decision


@uncached("promote")
def promote(model: RegisteredModel, decision: GateDecision) -> Promotion:
    """Make the version the champion, unless the champion is no longer the one that `decision`
    compares it with, or a user has pinned the champion."""
    registry = open_registry(RegistryRecipe(kind=model.registry, model_name=model.name))
    promotion = registry.promote(model, decision.champion_version, _actor(), decision.reason)
    conclude(f"{model.name} version {model.version}: {promotion.result}: {promotion.reason}")
    return promotion


def earlier_versions(
    registry: Registry, name: str, rules: Sequence[GateRule], model: OnnxModel
) -> list[EarlierVersion]:
    """Return the champion, and the versions that `rules` need beside it. `model` is the candidate.

    A damaged version is left out with a warning, unless it is the champion or named by a rule."""
    named = {rule.than for rule in rules if rule.kind == "not_worse"}
    down = taken_down(registry.history(name)) if "best" in named else set()
    found = []
    for version in registry.list(name):
        if version.role == REJECTED:
            continue
        may_be_best = version.version not in down
        is_champion = version.role == CHAMPION
        needed = is_champion or version.version in named
        if not needed and not ("best" in named and may_be_best):
            continue
        try:
            content = registry.read_verified(version, REGISTERED_ANSWERS) or b""
        except RegistryUnavailable:
            raise
        except RegistryError as error:
            if needed:
                raise
            _log.warning("the gate leaves out a version: %s", error)
            continue
        title = f"{version.name} version {version.version}"
        found.append(
            EarlierVersion(
                version=version.version,
                title=title,
                answers=parse_answers(content, f"{title}: {REGISTERED_ANSWERS}"),
                is_champion=is_champion,
                may_be_best=may_be_best,
                is_candidate=version.model_sha256 == model.artifact.sha256,
            )
        )
    return found


def asked(
    registry: Registry,
    earlier: EarlierVersion,
    name: str,
    rows: Path,
) -> EarlierVersion:
    """Return a version with its answers to `rows`, which it is asked now; as it is, where its
    manifest does not tell with which prompt it is asked."""
    version = registry.get(name, earlier.version)
    made = registry.provenance(version)["provenance"]
    if not made.get("prompt"):
        return earlier
    prompt = prompt_in(made, earlier.title, classify=True)
    _log.info("%s has answered none of these test rows and is asked them", earlier.title)
    with working_folder("champion") as folder:
        model = ModelToScore(
            name=CHAMPION, kind="onnx", folder=str(registry.download(version, folder / "model"))
        )
        scored = score_model(model, rows, prompt)
    answers = answer_rows(read_examples(rows), CHAMPION, scored.answers)
    return replace(earlier, answers=answers)


def _kept_answers(store: ArtifactStore, version: EarlierVersion) -> Artifact:
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in version.answers.values()]
    with working_folder("answers") as folder:
        write_text(folder / ANSWERS_FILE, "".join(lines))
        return store.put(folder)


def _examples(store: ArtifactStore, rows: Rows) -> list[Example]:
    return read_examples(store.fetch(rows.artifact) / rows.file)


def _actor() -> Actor:
    return Actor(produced_by(), str(flow_run.id or ""))


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: value.model_dump(mode="json") if isinstance(value, BaseModel) else value
        for key, value in values.items()
    }


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
        # Without the registry's own files, what is delivered has the digest of what was registered.
        shutil.copytree(folder, copy, dirs_exist_ok=True)
        (copy / MANIFEST).unlink()
        (copy / SIGNATURE).unlink(missing_ok=True)
        artifact = ArtifactStore().put(copy)
    return described.model_copy(update={"artifact": artifact, **origin(started)})

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from contextlib import (
    AbstractContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
    nullcontext,
)
from functools import partial
from pathlib import Path
from typing import Any

from prefect import get_run_logger, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import CacheKeyFnPolicy
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError, concurrency
from prefect.runtime import flow_run

from distillery.data.examples import each_example
from distillery.errors import TeacherChanged, TeacherError
from distillery.labels import known, labelling
from distillery.labels.canaries import ask_canaries
from distillery.labels.cascade import label_in_cascade
from distillery.labels.files import LabelCounts
from distillery.labels.known import read_label_files, write_known_labels
from distillery.labels.labelling import Progress, Slots
from distillery.labels.questions import check_of_train_rows
from distillery.labels.quote import gold_rows, named_tokenizer, quote, token_counter
from distillery.labels.report import read_report
from distillery.labels.store import LabelStore
from distillery.labels.trust import leaning, refuse_collapsed
from distillery.machine import usable_cores
from distillery.markdown import escape
from distillery.recipe import FilterRecipe, OtherRecipe, PromptRecipe, Recipe, TeacherRecipe
from distillery.records import (
    Example,
    OnnxModel,
    PreparedDataset,
    Rows,
    TeacherDrift,
    TeacherLabels,
    digest_of,
)
from distillery.serving.process import served
from distillery.storage.artifacts import ArtifactStore
from distillery.storage.working import working_folder
from distillery.teacher.endpoint import Endpoint, resolve_endpoint
from distillery.teacher.identity import identity_of_cheap
from distillery.teacher.ledger import Payer, Purpose
from tasks.locks import Lease, leased
from tasks.progress import conclude, show_rows
from tasks.stage import RESULT, Stage, content_of, is_cached, origin, stage

AS_TOLD = TeacherRecipe(filters=FilterRecipe(minimum_accepted=0))
"""A teacher's settings for labels that are taken as they are."""

PURPOSES: dict[str, Purpose] = {"validation": "validation row", "test": "test row"}
"""What the ledger calls the rows of a split; those of other splits are labelled to train on."""


@stage("label", version=5, added_later={"cheap_identity"})
def label(
    rows: Rows,
    prompt: PromptRecipe,
    teacher: TeacherRecipe,
    identity: str,
    model: OnnxModel | None = None,
    cheap_identity: str | None = None,
) -> TeacherLabels:
    """Ask the teacher `identity` what the label store does not know yet.

    A local teacher's `model` is served for that time. Where the recipe has a cheap teacher,
    `cheap_identity`, it is asked first."""
    started = time.perf_counter()
    store, logger = ArtifactStore(), get_run_logger()
    examples = store.fetch(rows.artifact) / rows.file
    folder_of_model = store.fetch(model.artifact) if model else None
    if model:
        teacher = teacher.for_own_model(prompt)
    tokenizer = named_tokenizer(teacher) or (str(folder_of_model) if folder_of_model else None)
    where = (
        _local_endpoint(folder_of_model, identity, prompt.answer == "written")
        if folder_of_model
        else nullcontext(resolve_endpoint(teacher))
    )
    with working_folder("labels") as folder, LabelStore(max_age=teacher.max_age) as answers:
        cheap, asked, name = teacher.cheap, teacher, identity
        tokens = token_counter(tokenizer) if tokenizer else None
        payer, purpose = payer_of_run(), purpose_of(rows)
        if cheap and cheap_identity:
            asked, name, tokens = cheap, cheap_identity, None
        # Rows that teacher.select has chosen lie in a folder without gold rows.
        gold = gold_rows(examples.parent)
        quoted = quote(each_example(examples), prompt, asked, name, answers, tokens, payer, gold)
        logger.info("%s", quoted.line())
        # No children ask the run's own server.
        alone = nullcontext() if model else at_once_by_one(rows, prompt, teacher, identity)
        with alone, where as endpoint:
            each = partial(each_example, examples)
            work = labelling_of(
                each,
                rows.rows,
                prompt,
                teacher,
                endpoint,
                answers,
                folder,
                payer=payer,
                purpose=purpose,
            )
            counts = asyncio.run(work)
        report = read_report(folder)
        artifact = store.put(folder)
    used = counts.usage.prompt_tokens + counts.usage.completion_tokens
    cost = "" if counts.cost is None else f", {counts.cost:.2f} {counts.currency}"
    calls = sum(each.calls for each in counts.paid)
    by_whom = f"; {counts.cascade.line()}" if counts.cascade else ""
    conclude(f"{report.line()}; {calls} calls, {used} tokens{cost}{by_whom}")
    return TeacherLabels(
        artifact=artifact,
        teacher=identity,
        soft=teacher.soft_labels,
        **origin(started),
        **vars(counts),
    )


def at_once_by_one(
    rows: Rows,
    prompt: PromptRecipe,
    teacher: TeacherRecipe,
    identity: str,
    children_of: str | None = None,
) -> AbstractContextManager[Lease]:
    """Hold the lease on asking a teacher, `identity`, about these rows: of two runs, one in one
    process and one in several (label_parts.py), one waits for the other's answers. `children_of`
    as in `leased`."""
    asked = [rows.content_id, content_of(prompt), identity, identity_of_cheap(teacher)]
    return leased(f"ask-{digest_of(asked)}", children_of)


def labelling_of(
    rows: Callable[[], Iterable[Example]],
    count: int,
    prompt: PromptRecipe,
    teacher: TeacherRecipe,
    endpoint: Endpoint,
    answers: LabelStore,
    folder: Path,
    *,
    payer: Payer,
    purpose: Purpose,
    progress: Progress = show_rows,
) -> Coroutine[Any, Any, LabelCounts]:
    """Return the work of labelling `count` rows, which `rows` returns anew at each call: by the
    teacher, or by its cheap one first where it has one."""
    cheap = teacher.cheap
    if cheap:
        return label_in_cascade(
            rows,
            prompt,
            teacher,
            cheap,
            endpoint,
            resolve_endpoint(cheap),
            answers,
            folder,
            progress,
            count=count,
            slots=slots_of(teacher),
            cheap_slots=slots_of(cheap),
            payer=payer,
            purpose=purpose,
        )
    return labelling.label(
        rows(),
        prompt,
        teacher,
        endpoint,
        answers,
        folder,
        progress,
        rows=count,
        slots=slots_of(teacher),
        payer=payer,
        purpose=purpose,
    )


def purpose_of(rows: Rows) -> Purpose:
    """Return what the ledger calls the calls for a split's rows."""
    return PURPOSES.get(Path(rows.file).stem, "label")


def payer_of_run() -> Payer:
    """Return on whose behalf this flow run asks: its id, and the name of its recipe, if it has
    one."""
    recipe = flow_run.parameters.get("recipe")
    if isinstance(recipe, dict):
        recipe = Recipe.model_validate(recipe)
    name = recipe.name if isinstance(recipe, Recipe) else ""
    return Payer(run=str(flow_run.id), recipe=name) if flow_run.id else Payer(recipe=name)


def slots_of(teacher: TeacherRecipe) -> Slots:
    """Return what holds the slots of a recipe's shared_limit, if it has one."""
    if not teacher.shared_limit:
        return nullcontext
    return partial(shared_slot, teacher.shared_limit, teacher.section)


@asynccontextmanager
async def shared_slot(limit: str, section: str = TeacherRecipe.section) -> AsyncIterator[None]:
    """Hold a slot of the Prefect concurrency limit that all runs of this teacher share; `section`
    of the recipe names it, for messages.

    Raises TeacherError where the server has no such limit."""
    async with AsyncExitStack() as held:
        try:
            await held.enter_async_context(concurrency(limit, occupy=1, strict=True))
        except ConcurrencySlotAcquisitionError:
            raise TeacherError(
                f"{section}.shared_limit: the Prefect server has no concurrency limit {limit}; "
                f"create it with prefect gcl create {limit} --limit CALLS"
            ) from None
        yield


@contextmanager
def _local_endpoint(folder: Path, identity: str, written: bool) -> Iterator[Endpoint]:
    """Serve the exported teacher over HTTP on the loopback interface, for the client of paid
    endpoints. `written`: its answers are."""
    with served(folder, "teacher", threads=usable_cores(), for_labels=written) as server:
        yield Endpoint(
            url=server.url, model="teacher", key=server.key, identity=identity, sdk="openai"
        )


@stage("gold labels", version=3)
def gold_labels(
    rows: Rows, prompt: PromptRecipe, teacher: TeacherRecipe = AS_TOLD
) -> TeacherLabels:
    """Return the rows' own answers in the shape of a teacher's labels."""
    started = time.perf_counter()
    store = ArtifactStore()
    file = store.fetch(rows.artifact) / rows.file
    labels = known.gold_labels(each_example(file))
    with working_folder("gold") as folder:
        counts = write_known_labels(each_example(file), labels, prompt, teacher, folder)
        artifact = store.put(folder)
    return TeacherLabels(
        artifact=artifact, teacher="gold", soft=False, **origin(started), **vars(counts)
    )


@stage("labels from files", version=3)
def labels_from_files(
    rows: Rows, prompt: PromptRecipe, teacher: TeacherRecipe, identity: str
) -> TeacherLabels:
    """Return the labels that teacher.files hold for these rows; `identity` is the files' digest."""
    started = time.perf_counter()
    store = ArtifactStore()
    file = store.fetch(rows.artifact) / rows.file
    labels, tokens = read_label_files(teacher.files, each_example(file))
    with working_folder("files") as folder:
        counts = write_known_labels(each_example(file), labels, prompt, teacher, folder, tokens)
        report = read_report(folder)
        artifact = store.put(folder)
    conclude(report.line())
    soft = all(label.distribution or name in tokens for name, label in labels.items())
    return TeacherLabels(
        artifact=artifact, teacher=identity, soft=soft, **origin(started), **vars(counts)
    )


def rows_to_ask(
    recipe: Recipe, train: Rows, data: PreparedDataset, identity: str, test: bool
) -> list[tuple[Rows, TeacherRecipe]]:
    """Return the rows of each split that a run of a recipe has its endpoint label, and with which
    settings, but for splits whose labels are cached. `test`: whether the test rows are among
    them."""
    measured = recipe.teacher_of_test_rows
    asked = [(train, recipe.teacher)]
    if test:
        asked.append((data.rows("test"), measured))
    if recipe.task.kind == "classify" and recipe.dataset.roles >= {"gold", "validation"}:
        asked.append((data.rows("validation"), measured))
    return [
        (rows, teacher)
        for rows, teacher in asked
        # With teacher.max_age, labels that are cached are made again (`label_of`).
        if teacher.max_age is not None
        or not is_cached(
            label,
            rows=rows,
            prompt=recipe.prompt,
            teacher=teacher,
            identity=identity,
            cheap_identity=identity_of_cheap(teacher),
        )
    ]


def labelled(
    rows: Rows,
    recipe: Recipe,
    identity: str,
    model: OnnxModel | None,
    again: Callable[[Stage, Any], Any],
) -> TeacherLabels:
    """Return the labels to train on, from the kind of teacher that the recipe names."""
    labels: TeacherLabels
    if recipe.teacher.kind == "gold":
        labels = again("label", gold_labels)(rows, recipe.prompt, recipe.teacher)
    elif recipe.teacher.kind == "file":
        labels = again("label", labels_from_files)(rows, recipe.prompt, recipe.teacher, identity)
    else:
        asked = again("label", label_of(recipe.teacher))
        cheap = identity_of_cheap(recipe.teacher)
        labels = asked(rows, recipe.prompt, recipe.teacher, identity, model, cheap)
    return labels


def check_askable(recipe: Recipe, train: Rows) -> None:
    """Raise DataError, before anything is trained, for a train row that the recipe's teacher can't
    be asked."""
    if check := check_of_train_rows(recipe):
        check(each_example(ArtifactStore().fetch(train.artifact) / train.file))


def check_shares(
    labels: TeacherLabels,
    gold: Rows | None,
    largest_shift: float,
    other: OtherRecipe | None = None,
    chosen: bool = False,
) -> str | None:
    """Raise TeacherError for labels that have collapsed, or whose shares are far from those of the
    gold rows. Return what to tell of labels that lean to one class less far; None if they don't.
    The class `other` counts on neither side: how many rows a file names for it says nothing about
    how many there are among the others. `chosen`: whether the rows are, whose shares differ
    from the gold ones' on purpose; such labels may only not be nearly all of one class."""
    if gold is None:
        return None
    store = ArtifactStore()
    given = read_report(store.fetch(labels.artifact)).letters
    expected = Counter(
        row.answer_key
        for row in each_example(store.fetch(gold.artifact) / gold.file)
        if row.answer_key and not (other and row.answer_key == other.label)
    )
    if other:
        # Labels that are all of the class stay: a teacher that says nothing else has collapsed.
        given = {name: count for name, count in given.items() if name != other.label} or given
    refuse_collapsed(given, expected, 1.0 if chosen else largest_shift)
    return None if chosen else leaning(given, expected)


def measured_against(rows: Rows, recipe: Recipe, identity: str) -> TeacherLabels:
    """Return what the student is measured against on the test rows: its teacher's unfiltered
    answers.

    Where that teacher can't be asked about them, these are the gold answers."""
    if recipe.teacher.kind in ("gold", "file"):
        return gold_labels(rows, recipe.prompt)
    teacher = recipe.teacher_of_test_rows
    labels: TeacherLabels = label_of(teacher)(rows, recipe.prompt, teacher, identity)
    return labels


def label_of(teacher: TeacherRecipe) -> Any:
    """Return the stage `label`. With teacher.max_age its cache is set aside, since which answers
    are too old depends on the day; answers that have not changed still give the same labels, so
    that later stages are found in the cache."""
    if teacher.max_age is None:
        return label
    return label.with_options(refresh_cache=True)


def _once_a_run(_context: Any, parameters: dict[str, Any]) -> str | None:
    # A run may ask those of two teachers.
    return f"canaries-{flow_run.id}-{digest_of(parameters['identity'])}" if flow_run.id else None


@task(
    name="canaries",
    task_run_name="canaries",
    # A run that has waited for its batches starts anew, and has asked them already.
    cache_policy=CacheKeyFnPolicy(cache_key_fn=_once_a_run),
    **RESULT,
)
def canaries(
    rows: Rows, prompt: PromptRecipe, teacher: TeacherRecipe, identity: str
) -> TeacherDrift:
    """Ask the canary rows again and report how many are answered differently than before."""
    store = ArtifactStore()
    examples = each_example(store.fetch(rows.artifact) / rows.file)
    endpoint, slots = resolve_endpoint(teacher), slots_of(teacher)
    with LabelStore() as answers:
        payer = payer_of_run()
        asked = ask_canaries(examples, prompt, teacher, endpoint, answers, slots=slots, payer=payer)
        drift = asyncio.run(asked)
    heed_drift(drift, teacher, identity)
    return drift


def heed_drift(drift: TeacherDrift, teacher: TeacherRecipe, identity: str) -> None:
    """Log a drift. A share above canaries.threshold is a warning, or raises TeacherChanged if
    canaries.stop is true."""
    logger, canaries = get_run_logger(), teacher.canaries
    logger.info("%s", drift.line())
    if drift.share <= canaries.threshold:
        return
    create_markdown_artifact(
        key=f"{teacher.who.replace(' ', '-')}-drift",
        markdown=drift_in_markdown(drift),
        description=f"{escape(identity)} has changed",
    )
    told = (
        f"{identity}: {drift.line()}, more than {teacher.budget_section}.canaries.threshold "
        f"({canaries.threshold:.0%})"
    )
    if canaries.stop:
        raise TeacherChanged(
            f"{told}; give the new {teacher.who} another {teacher.section}.identity, or set "
            "canaries.stop: false"
        )
    logger.warning("%s", told)


def drift_in_markdown(drift: TeacherDrift) -> str:
    """Return a drift with the ids of the rows that are answered differently."""
    listed = [f"- {escape(row)}" for row in drift.changed]
    return "\n".join([f"# {escape(drift.line())}", "", *listed])

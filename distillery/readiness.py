"""Check what a run needs of the machine and of accounts, before it spends anything.

`check` looks at everything, for `distillery check`. `check_settings` is the part that every run
starts with: it is fast, asks no service and raises what it finds. `check_base_models` is the part
that may ask one: a run calls it before it asks a teacher anything.
"""

import asyncio
import json
import logging
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from distillery.answers import FORMATS, unchecked_formats
from distillery.data.answer_format import named_format
from distillery.data.few_rows import few_rows
from distillery.data.other import other_rows
from distillery.data.prepare import check_rows
from distillery.data.rows import RowReader
from distillery.data.source import source_identity
from distillery.errors import (
    CredentialsError,
    DataError,
    DistilleryError,
    RecipeError,
    StoreError,
    TrainingUnavailable,
)
from distillery.export.fit import misfit
from distillery.labels.questions import check_of_train_rows
from distillery.models.base import (
    check_config,
    check_loadable,
    has_all_weights,
    has_chat_template,
    has_tokenizer,
    local_config,
    local_copy,
    pin_revision,
    preview,
    refuse_unnamed_code,
    remote_code_allowed,
)
from distillery.models.four_bits import check_four_bits
from distillery.models.load import load_tokenizer
from distillery.recipe import (
    BaseModelRecipe,
    DatasetRecipe,
    ExportForm,
    Recipe,
    TeacherRecipe,
    TrainingRecipe,
)
from distillery.records import Record
from distillery.registry.open import open_registry
from distillery.settings import AzureMLSettings, LocalSettings
from distillery.storage.artifacts import ArtifactStore
from distillery.storage.working import working_folder
from distillery.teacher.asking import ProbeResult, probe
from distillery.teacher.batch import check_takes_batches
from distillery.teacher.endpoint import LOGIN_S, Endpoint, resolve_endpoint
from distillery.teacher.identity import refuse_one_identity, teacher_identity
from distillery.teacher.ledger import Book, Payer
from distillery.training.footprint import Shape, bytes_a_token, fixed_bytes, split_bytes

STORE_WAIT_S = 5.0
"""Seconds to wait for a store or a database that does not answer: shorter than a run waits."""

PROBE_S = 25.0
"""Seconds for each of the probe's two attempts."""

LIMIT_S = LOGIN_S + 2 * PROBE_S + STORE_WAIT_S + 10
"""Seconds that each check may take: the teacher's login and both attempts fit, with the pause
between these and the wait for the ledger, so that a check that fails says why."""

GB = 1e9

LEAST_DISK = 5 * GB

DISK_FACTOR = 6
"""A run writes the weights of base model, teacher and student and their exports, some of them
twice."""

MEMORY_FACTOR = {"full": 4, "lora": 2, "qlora": 2, "dora": 2}
"""Memory of a training in multiples of the float32 weights. full: weights, gradients and AdamW's
two moments. The others: two copies of the weights, while one is cast or exported."""

GGUF_FACTOR = 6
"""Bytes in float32 for each byte of a GGUF file with 4 to 5 bits a weight."""

LARGE = 4 * GB
"""Bytes of float32 weights (a billion parameters) above which training on a CPU takes hours to
days."""


_log = logging.getLogger(__name__)


class Finding(Record):
    """The result of a check. `item`: what was looked at. `text`: for FAIL, with what to do."""

    level: Literal["ok", "warn", "FAIL"]
    item: str
    text: str

    def __str__(self) -> str:
        return f"{self.level:4} {self.item}: {self.text}"


def ok(item: str, text: str) -> Finding:
    return Finding(level="ok", item=item, text=text)


def warn(item: str, text: str) -> Finding:
    return Finding(level="warn", item=item, text=text)


def fail(item: str, text: str) -> Finding:
    return Finding(level="FAIL", item=item, text=text)


Check = Callable[[Recipe], Iterable[Finding]]
"""Yields findings. A DistilleryError that it raises becomes a finding too."""


def check_settings(recipe: Recipe) -> None:
    """Raise what would otherwise stop a run after its paid or slow stages. Asks no service. A flow
    that asks the recipe's judge checks its endpoint itself, since a search asks none."""
    if recipe.teacher.kind == "endpoint":
        check_takes_batches(recipe.teacher, resolve_endpoint(recipe.teacher))
    if recipe.teacher.cascade:
        cheap = resolve_endpoint(recipe.teacher.cascade)
        refuse_one_identity(teacher_identity(recipe.teacher, None), cheap.identity)
    if recipe.registry.kind == "azureml":
        AzureMLSettings().require()
    for base in base_models(recipe):
        refuse_unnamed_code(base)
        complaint = export_misfit(base, recipe)
        if complaint:
            raise RecipeError(complaint)


def check_methods(recipe: Recipe) -> None:
    """Raise TrainingUnavailable where the recipe trains by a method whose package is missing here.
    For runs that train on this machine."""
    if any(training.method == "qlora" for training in trainings_of(recipe)):
        check_four_bits()


def trainings_of(recipe: Recipe) -> list[TrainingRecipe]:
    """Return all trainings of a run."""
    trainings = list(recipe.student.trainings)
    if recipe.teacher.kind == "local":
        trainings.append(recipe.teacher.preparation.training)
    return trainings


def check_base_models(recipe: Recipe) -> None:
    """Raise what would stop a run at a base model that is not on this machine yet, and log how much
    it downloads. Asks the hub or the registry, and downloads config and tokenizer.

    Models that are on this machine are left to `check_settings`: a run that finds every stage in
    the cache needs nobody's answer."""
    missing = missing_base_models(recipe)
    for base in missing:
        for finding in check_base_model(base, recipe):
            if finding.level == "FAIL":
                raise RecipeError(f"{finding.item}: {finding.text}")
            _log.warning("%s: %s", finding.item, finding.text)
    if missing:
        for finding in check_disk(recipe):
            if finding.level == "FAIL":
                _log.warning("%s: %s", finding.item, finding.text)


def missing_base_models(recipe: Recipe) -> list[BaseModelRecipe]:
    """Return the recipe's base models that are not on this machine."""
    return [base for base in base_models(recipe) if local_copy(base) is None]


def check(recipe: Recipe, limit_s: float = LIMIT_S) -> list[Finding]:
    """Return what was found about everything that a run of `recipe` needs on this machine.

    Each check takes `limit_s` seconds at most. Raises nothing, downloads no weights and no rows,
    and spends one question to the endpoint of teacher, cheap teacher and judge each, or two where
    it has two addresses.
    """
    checks: dict[str, Check] = {"teacher": check_teacher}
    if recipe.teacher.cascade:
        checks["cheap teacher"] = check_cheap_teacher
    if recipe.evaluation.judge:
        checks["judge"] = check_judge
    checks["data"] = check_data
    for base in base_models(recipe):
        checks[f"base model {base.model}"] = partial(check_base_model, base)
    checks["disk"] = check_disk
    checks["memory"] = check_memory
    checks["training"] = check_training
    checks["artifact store"] = check_artifact_store
    checks["label store"] = check_label_store
    checks["registry"] = check_registry
    findings = []
    for item, run_check in checks.items():
        findings += run_within(limit_s, item, run_check, recipe)
    return findings


def run_within(limit_s: float, item: str, run_check: Check, recipe: Recipe) -> list[Finding]:
    """Return the findings of a check, or one that says why it could not be finished."""
    findings: list[Finding] = []

    def run() -> None:
        try:
            findings.extend(run_check(recipe))
        except DistilleryError as error:
            findings.append(fail(item, str(error)))
        except Exception as error:
            # The text of a library's error is left out: it may hold a secret.
            findings.append(fail(item, f"could not be checked ({type(error).__name__})"))

    # A check that hangs is left behind; a daemon thread does not keep the process alive.
    thread = threading.Thread(target=run, daemon=True, name=f"check {item}")
    thread.start()
    thread.join(limit_s)
    if not thread.is_alive():
        return findings
    if item == "data" and recipe.dataset.source != "hub":
        return [warn(item, f"not read within {limit_s:g} s; the run reads its rows when it starts")]
    return [
        fail(
            item,
            f"no answer within {limit_s:g} s; see that it is up and reachable, or check again when "
            "this machine is less busy",
        )
    ]


def check_teacher(recipe: Recipe) -> Iterator[Finding]:
    teacher = recipe.teacher
    if teacher.kind == "endpoint":
        yield from check_endpoint(teacher, recipe.name)
    elif teacher.kind == "local":
        base = teacher.preparation.base.model
        yield ok("teacher", f"the run prepares it from {base} and serves it itself")
    else:
        yield ok("teacher", f"none is asked: {teacher_identity(teacher, None)}")


def check_cheap_teacher(recipe: Recipe) -> Iterator[Finding]:
    if recipe.teacher.cascade:
        yield from check_endpoint(recipe.teacher.cascade, recipe.name)


def check_judge(recipe: Recipe) -> Iterator[Finding]:
    if recipe.evaluation.judge:
        yield from check_endpoint(recipe.evaluation.judge, recipe.name)


def check_endpoint(teacher: TeacherRecipe, recipe_name: str = "") -> Iterator[Finding]:
    """Check the credentials of the endpoint of a teacher, a cheap one or a judge, and ask it one
    question. For an address of the retired model inference API, ask the v1 endpoint of the same
    resource too. The ledger has the calls under the recipe's name."""
    who = teacher.who
    try:
        endpoint = resolve_endpoint(teacher)
    except CredentialsError as error:
        yield fail(f"{who} credentials", str(error))
        yield warn(f"{who} endpoint", "not asked, because its credentials are missing")
        return
    yield ok(f"{who} credentials", f"set for {endpoint.url}, through {endpoint.sdk}")
    successor = endpoint.successor
    with ledger_if_any() as book:
        ask = partial(probed, teacher, book=book, payer=Payer(recipe=recipe_name))
        if successor:
            result, other = asyncio.run(ask([endpoint, successor]))
            yield compare_addresses(teacher, successor.url, result, other)
        else:
            (result,) = asyncio.run(ask([endpoint]))
    if isinstance(result, DistilleryError):
        yield fail(f"{who} endpoint", str(result))
        return
    if not result.answers:
        text = f"{endpoint.model} answers without text; raise {teacher.section}.max_tokens"
        yield fail(f"{who} endpoint", text)
        return
    yield ok(f"{who} endpoint", f"{endpoint.model} answers in {result.latency_ms:.0f} ms")
    if not teacher.asks_log_probabilities:
        return
    if result.log_probabilities:
        yield ok("log-probabilities", f"given, as {teacher.section}.soft_labels needs them")
    else:
        yield fail(
            "log-probabilities",
            f"{endpoint.url} gives none; set {teacher.section}.soft_labels: false, or choose a "
            f"{who} that gives them",
        )


@contextmanager
def ledger_if_any() -> Iterator[Book | None]:
    """Yield what records calls in the ledger; None where the label database can't be opened, which
    `check_label_store` says."""
    from distillery.labels.store import LabelStore

    try:
        answers = LabelStore(wait_s=STORE_WAIT_S)
    except StoreError:
        yield None
        return
    try:
        yield answers
    finally:
        with suppress(StoreError):
            answers.close()


async def probed(
    teacher: TeacherRecipe,
    endpoints: Sequence[Endpoint],
    book: Book | None = None,
    payer: Payer | None = None,
) -> list[ProbeResult | DistilleryError]:
    """Ask each endpoint one question, all at a time; return what each showed, or its error.
    `book` and `payer` as in `Teacher`."""
    timeout_s = min(teacher.timeout_s, PROBE_S)
    hasty = teacher.model_copy(update={"timeout_s": timeout_s})

    async def ask(endpoint: Endpoint) -> ProbeResult | DistilleryError:
        try:
            return await probe(hasty, endpoint, book, payer)
        except DistilleryError as error:
            return error

    return await asyncio.gather(*map(ask, endpoints))


def compare_addresses(
    teacher: TeacherRecipe,
    successor: str,
    given: ProbeResult | DistilleryError,
    other: ProbeResult | DistilleryError,
) -> Finding:
    """Say which address answers: the `given` one, of the retired model inference API, or the v1
    endpoint of the same resource, whose URL is `successor`."""
    item = f"{teacher.who} address"
    advice = f"set {teacher.variables}_ENDPOINT={successor}"
    if isinstance(other, DistilleryError):
        if isinstance(given, DistilleryError):
            return fail(item, f"neither the given one nor {successor} answers: {other}")
        return ok(item, f"the given one answers; {successor} does not: {other}")
    if isinstance(given, DistilleryError):
        return fail(item, f"{successor} answers, and the given one does not; {advice}")
    return warn(item, f"both answer, and the given one is of a retired API; {advice}")


def check_data(recipe: Recipe) -> Iterator[Finding]:
    """Read and check every row, save those of a hub data set, which the check does not download."""
    dataset = recipe.dataset
    answer_format = named_format(recipe.task)
    schema = answer_format.json_schema if answer_format else None
    unchecked = sorted(set(unchecked_formats(schema or {})))
    if unchecked:
        told = f"format: {', '.join(unchecked)}: not checked, as only {', '.join(FORMATS)} are"
        yield warn("task.schema", told)
    if dataset.source == "hub":
        if recipe.task.other:
            reader = RowReader(dataset.columns, dataset.fields, classify=True)
            count = sum(1 for _ in other_rows(recipe.task.other, reader, dataset.seed))
            yield ok("task.other", f"every file is read; rows: {count:,}")
        if answer_format:
            yield ok("task", "the format of the answers is read")
        yield check_hub(dataset)
        return
    counts = check_rows(dataset, recipe.task, check_of_train_rows(recipe))
    rows = ", ".join(f"{count:,} {role}" for role, count in counts.items())
    source = "the shipped sample" if dataset.source == "sample" else "every file is read"
    yield ok("data", f"{source}; rows: {rows}")
    for item, text in few_rows(counts).items():
        yield warn(item, text)


def check_hub(dataset: DatasetRecipe) -> Finding:
    """Ask the hub for the data set's newest commit, even if the recipe names a revision."""
    try:
        newest = source_identity(dataset.model_copy(update={"revision": None, "corrections": ()}))
    except DataError as error:
        if not dataset.revision:
            raise
        return warn(
            "data",
            f"{error}; the run needs a copy of revision {dataset.revision} on this machine",
        )
    return ok("data", f"the hub has {newest}; its rows are read when the run starts")


def base_models(recipe: Recipe) -> tuple[BaseModelRecipe, ...]:
    """Return the base models that the run loads, each once."""
    bases = []
    if recipe.teacher.kind == "local":
        bases.append(recipe.teacher.preparation.base)
    if recipe.student.start == "base":
        bases.append(recipe.student.base)
    return tuple(dict.fromkeys(bases))


def export_misfit(base: BaseModelRecipe, recipe: Recipe) -> str | None:
    """Return why a model made from `base` can't be asked as the recipe asks it or exported in its
    forms; None if it can.

    Rungs of a ladder that don't fit are left out by the run, so one that fits is enough. A base
    model that is missing or broken is not judged: the stage that loads it says so.
    """
    try:
        local = local_copy(base)
        if local is None or local.is_file():
            return None
        return complaint_about(local, base, recipe)
    except (DistilleryError, OSError, ValueError):
        return None


def complaint_about(folder: Path, base: BaseModelRecipe, recipe: Recipe) -> str | None:
    """Return what `export_misfit` does, of a folder with config.json and tokenizer.

    Raises OSError and ValueError for a config.json that can't be read."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if not has_tokenizer(folder):
        return f"base model {base.model}: it has no tokenizer; choose one that has"
    if not has_chat_template(folder):
        return (
            f"base model {base.model}: it has no chat template; choose an instruction-tuned model"
        )
    preparation = recipe.teacher.preparation
    if recipe.teacher.kind == "local" and base == preparation.base:
        complaint = misfit(preparation.export, config, "teacher.preparation.export")
        if complaint:
            return complaint
    if base != recipe.student_base:
        return None
    forms: tuple[ExportForm, ...] = recipe.export.ladder or (recipe.export.form,)
    complaints = [misfit(form, config) for form in forms]
    if all(complaints):
        return complaints[0]
    return None


def check_base_model(base: BaseModelRecipe, recipe: Recipe) -> Iterator[Finding]:
    item = f"base model {base.model}"
    if base.trust_remote_code:
        # Its code may run at a commit alone.
        base = pin_revision(base)
    local = local_copy(base)
    if local is None:
        yield check_download(item, base, recipe)
    elif local.is_file():
        yield ok(item, f"{local.name}, converted at its first use")
    else:
        check_loadable(local, base)
        complaint = export_misfit(base, recipe)
        if complaint:
            yield fail(item, complaint)
        else:
            yield ok(item, f"{parameters_text(local)} in {local}")


def check_download(item: str, base: BaseModelRecipe, recipe: Recipe) -> Finding:
    """Check a base model that the run will download: that it is there, that it fits the recipe and
    the disk, and that its tokenizer loads."""
    found = preview(base)
    check_config(found.folder, base)
    complaint = complaint_about(found.folder, base, recipe)
    if complaint:
        return fail(item, complaint)
    load_tokenizer(found.folder, remote_code_allowed(base))
    free = free_bytes(found.target)
    size = f"{found.bytes / GB:.1f} GB from {found.source}"
    if free < found.bytes:
        return fail(
            item,
            f"the run downloads {size}, and {free / GB:.1f} GB are free at {found.target}; free "
            "some space, or set DISTILLERY_HOME (for the hub, HF_HOME) to another disk",
        )
    return warn(
        item,
        f"not on this machine; the run downloads {size}: {parameters_text(found.folder)}",
    )


def free_bytes(folder: Path) -> int:
    """Return the bytes that are free on the disk of a folder, which need not be there yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def parameters_text(folder: Path) -> str:
    size = float32_bytes(folder)
    return "an unknown number of parameters" if size is None else f"{size / 4e6:,.1f} M parameters"


def float32_bytes(local: Path) -> int | None:
    """Return the bytes of a model's weights in float32: read from the weights, or told by
    config.json where they are not here yet. An estimate for a GGUF file; None where it can't be
    told."""
    from distillery.models.inspect import parameter_count, parameters_of_config

    if local.is_file():
        return local.stat().st_size * GGUF_FACTOR
    if has_all_weights(local):
        return parameter_count(local) * 4
    parameters = parameters_of_config(local)
    return None if parameters is None else parameters * 4


def largest_base_bytes(recipe: Recipe) -> int | None:
    """Return the bytes of the largest base model in float32; None if nothing of one is on this
    machine."""
    sizes = []
    for base in base_models(recipe):
        try:
            local = local_config(base)
        except DistilleryError:
            # The check of this base model reports it.
            return None
        size = float32_bytes(local) if local else None
        if size is None:
            return None
        sizes.append(size)
    return max(sizes)


def check_disk(recipe: Recipe) -> Iterator[Finding]:
    home = LocalSettings().folder
    with working_folder("check") as folder:
        (folder / "written").write_bytes(b"1")
        free = shutil.disk_usage(folder).free
    weights = largest_base_bytes(recipe)
    need = max(LEAST_DISK, DISK_FACTOR * (weights or 0))
    if free < need:
        yield fail(
            "disk",
            f"{free / GB:.1f} GB free at {home}, and a run takes about {need / GB:.0f} GB; "
            "free some space, or set DISTILLERY_HOME to another disk",
        )
    elif weights is None:
        text = f"a run takes about {DISK_FACTOR} times the base model's size"
        yield warn("disk", f"{free / GB:.1f} GB free; {text}")
    else:
        text = f"a run takes about {need / GB:.0f} GB"
        yield ok("disk", f"{free / GB:.1f} GB free, and {text}")


def check_memory(recipe: Recipe) -> Iterator[Finding]:
    import psutil

    free = psutil.virtual_memory().available
    weights = largest_base_bytes(recipe)
    if weights is None:
        text = "what a run takes is known once the base model is on this machine"
        yield warn("memory", f"{free / GB:.1f} GB free; {text}")
        return
    settings = LocalSettings()
    # Each of several devices has a process that loads the model. Where they share it out, none of
    # them holds the rest of what a training takes.
    of_process = GB + 2 * weights if settings.fsdp else training_bytes(recipe, weights)
    need = of_process * settings.devices
    text = f"{free / GB:.1f} GB free, and a run takes about {need / GB:.1f} GB"
    if free < need:
        advice = "end other programs, or choose a smaller base model or training.method: lora"
        yield fail("memory", f"{text}; {advice}")
    else:
        yield ok("memory", text)


def training_bytes(recipe: Recipe, weights: int) -> float:
    """Return the memory that training a model of `weights` bytes (float32) takes, in bytes."""
    factors = [MEMORY_FACTOR[training.method] for training in trainings_of(recipe)]
    return GB + max(factors) * weights


def check_training(recipe: Recipe) -> Iterator[Finding]:
    import torch

    from distillery.models.device import check_count, choose_device

    try:
        check_count()
        check_methods(recipe)
    except TrainingUnavailable as error:
        yield fail("training", str(error))
        return
    device = choose_device(recipe.student.training.precision)
    weights = largest_base_bytes(recipe)
    if device.name == "cuda":
        settings = LocalSettings()
        free = [torch.cuda.mem_get_info(gpu)[0] for gpu in range(settings.devices)]
        # Each holds the whole model, or as much of it.
        least = min(range(len(free)), key=free.__getitem__)
        text = f"on {torch.cuda.get_device_name(least)} in {device.precision}"
        if len(free) > 1:
            gpus = "GPUs that share out the model" if settings.fsdp else "GPUs"
            text = (
                f"on {len(free)} {gpus} in {device.precision}, of which GPU {least} has the least "
                f"memory free: {torch.cuda.get_device_name(least)}"
            )
        yield check_gpu_memory(recipe, device.precision, free[least], text)
    elif weights is None or weights > LARGE:
        yield warn(
            "training",
            f"no GPU: on the CPU in {device.precision}, which takes hours to days if the base "
            "model has billions of parameters; use a machine with CUDA, or send training there by "
            "training_deployment",
        )
    else:
        yield ok("training", f"on the CPU in {device.precision}")


def check_gpu_memory(recipe: Recipe, precision: str, free: int, text: str) -> Finding:
    """Compare the memory that is free on a GPU, in bytes, with the estimate of what the run's
    trainings take at most. `text`: which GPU it is."""
    text = f"{text}, {free / GB:.1f} GB of its memory free"
    needs = gpu_needs(recipe, precision)
    if needs is None:
        weights = largest_base_bytes(recipe)
        if weights is None:
            unknown = "what a run takes is known once the base model is on this machine"
            return warn("training", f"{text}; {unknown}")
        if free < training_bytes(recipe, weights):
            return warn("training", f"{text}, which may be too little")
        return ok("training", text)
    need = max(needs, key=lambda one: one.most)
    text = (
        f"{text}; the run takes an estimated {need.fixed / GB:.1f} GB, and "
        f"{1000 * need.token / GB:.1f} GB for every 1,000 tokens of a batch: {need.most / GB:.1f} "
        "GB at most"
    )
    if free >= need.most:
        return ok("training", text)
    if free < need.fixed:
        advice = "use a larger GPU"
        if LocalSettings().fsdp:
            advice = "use larger GPUs, or more of them (DISTILLERY_DEVICES)"
        # Weights in 4 bits are not split.
        elif need.method != "qlora":
            if need.in_four_bits <= free:
                advice += f", {need.section}.method: qlora,"
            advice += " or several GPUs that share out the model "
            advice += "(DISTILLERY_DEVICES, DISTILLERY_FSDP)"
        return warn("training", f"{text}; that is too little even for short rows: {advice}")
    advice = "set training.gradient_checkpointing: true or a smaller training.batch_size"
    return warn("training", f"{text}; that is too little if rows are long: {advice}")


class GpuNeed(NamedTuple):
    """Estimated memory of a training by `method` on a GPU, in bytes: whatever the batch, for each
    of its tokens, and with as many as a batch of the recipe can have. `section`: that of the
    recipe. `in_four_bits`: what `fixed` would be with qlora."""

    section: str
    method: str
    fixed: float
    token: float
    most: float
    in_four_bits: float


def gpu_needs(recipe: Recipe, precision: str) -> list[GpuNeed] | None:
    """Return what each training takes; None where the shape of a base model is not known here."""
    own, section = recipe.student_base, "student.training"
    trainings = [(section, own, training) for training in recipe.student.trainings]
    if recipe.teacher.kind == "local":
        preparation = recipe.teacher.preparation
        section = "teacher.preparation.training"
        trainings.append((section, preparation.base, preparation.training))
    needs = []
    settings = LocalSettings()
    tokens = recipe.prompt.max_tokens + (recipe.task.max_tokens if recipe.task.writes else 0)
    for section, base, training in trainings:
        shape = shape_of(base)
        if shape is None:
            return None
        held = fixed_bytes(shape, training.method, precision)
        if settings.fsdp:
            held = split_bytes(shape, training.method, precision, settings.devices)
        # Before the training, one GPU computes the teacher's states, in floats whatever the method.
        of_states = fixed_bytes(shape, "lora", precision) if training.hidden_weight else 0.0
        # CUDA itself, an adapter and the logits of a batch take less than 1 GB.
        fixed = GB + max(held, of_states)
        in_four_bits = GB + max(fixed_bytes(shape, "qlora", precision), of_states)
        checkpointing = training.gradient_checkpointing
        token = bytes_a_token(shape, training.method, precision, checkpointing)
        most = fixed + token * training.batch_size * tokens
        needs.append(GpuNeed(section, training.method, fixed, token, most, in_four_bits))
    return needs


def shape_of(base: BaseModelRecipe) -> Shape | None:
    """Return the shape that a base model's config.json tells; None where it is not here, or says it
    in other words, and for a mixture of experts, whose layers are not alike."""
    try:
        local = local_config(base)
        if local is None or local.is_file():
            return None
        size = float32_bytes(local)
        config = json.loads((local / "config.json").read_text(encoding="utf-8"))
        if "num_experts" in config or "num_local_experts" in config:
            return None
        layers, hidden = config["num_hidden_layers"], config["hidden_size"]
        intermediate = config["intermediate_size"]
        # Where it is not told, head and embeddings count as two.
        embeddings = 1 if config.get("tie_word_embeddings") else 2
        embedded = embeddings * config["vocab_size"] * hidden
    except (DistilleryError, OSError, ValueError, KeyError):
        # The check of this base model reports what is wrong with it.
        return None
    if size is None:
        return None
    return Shape(size // 4, layers, hidden, intermediate, embedded)


def check_artifact_store(_recipe: Recipe) -> Iterator[Finding]:
    ArtifactStore(wait_s=STORE_WAIT_S).write_record("check", "")
    yield ok("artifact store", "answers")


def check_label_store(_recipe: Recipe) -> Iterator[Finding]:
    from distillery.labels.store import LabelStore

    with LabelStore(wait_s=STORE_WAIT_S) as answers:
        answers.get_many([])
    yield ok("label store", "answers")


def check_registry(recipe: Recipe) -> Iterator[Finding]:
    registry = open_registry(recipe.registry)
    name = recipe.registry.model_name
    count = registry.check_access(name)
    yield ok("registry", f"{registry.location} answers; versions of {name}: {count}")

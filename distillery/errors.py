"""Every error that a user can meet, as a tree. Each message is one line: the setting, file or row
that is wrong, and what to do.

DistilleryError
├── RecipeError               a recipe that can't be read or asks for something impossible
├── DataError                 a wrong row, file or column of the data set
│   ├── PromptTooLong         a row whose prompt is over prompt.max_tokens or the model's context
│   ├── NoSuchRevision        the hub has no such data set or revision
│   └── DataUnavailable       the hub does not answer (infrastructure: worth a retry)
├── CredentialsError          a key, an endpoint name or a login is missing or refused
├── TeacherError              the teacher can't do what the recipe asks of it
│   ├── TeacherUnavailable    the endpoint does not answer, after all tries of a call
│   ├── BudgetReached         a limit of teacher.budget; the answers so far are kept
│   └── TeacherChanged        the teacher answers the canary rows differently than before
├── Waiting                   batches are under way: the run goes on when it is run again
├── StoreError                the artifact store or the shared database
│   ├── StoreUnavailable      does not answer (infrastructure: worth a retry)
│   ├── RowRefused            a row with a value that the database does not take
│   └── ArtifactDamaged       a folder that is missing, half-written or does not match its digest
├── TrainingError             training can't start or produced no usable student
│   └── TrainingUnavailable   the machine that trains is not there or died; says nothing of settings
│       └── ModelUnavailable  hub or registry do not give a base model now (infrastructure)
├── ExportError               Olive or ONNX Runtime produced no usable model
├── ModelError                a model folder that can't be loaded or asked
│   ├── SchemaNotHeld         answers can't be held to a JSON schema while they are generated
│   ├── AnswerStopped         an answer was given up, because nobody waits for it any more
│   └── OutOfResources        a process ran out of memory or time: elsewhere it may succeed
├── GateRefused               the gate refused the student, and evaluation.on_refusal is fail
├── StageError                a stage has no cache key: a defect of Distillery itself
└── RegistryError             a model can't be registered, found or downloaded
    ├── ModelGone             its files are neither on this machine nor in the store
    └── RegistryUnavailable   does not answer (infrastructure: worth a retry)
"""

import re


class DistilleryError(Exception):
    """Base of all errors that the user can mend; printed as one line, without a traceback."""


class RecipeError(DistilleryError):
    pass


class DataError(DistilleryError):
    pass


class PromptTooLong(DataError):
    pass


class NoSuchRevision(DataError):
    pass


class DataUnavailable(DataError):
    pass


class CredentialsError(DistilleryError):
    pass


class TeacherError(DistilleryError):
    pass


class TeacherUnavailable(TeacherError):
    """`overloaded`: the endpoint answers, but refuses because it has too much to do (429).
    `waited`: it said how long to wait, and each try did."""

    def __init__(self, message: str, overloaded: bool = False, waited: bool = False) -> None:
        super().__init__(message)
        self.overloaded = overloaded
        self.waited = waited


class BudgetReached(TeacherError):
    pass


class TeacherChanged(TeacherError):
    pass


class Waiting(DistilleryError):
    """`seconds`: after how long it is worth to run again."""

    def __init__(self, message: str, seconds: float = 0.0) -> None:
        super().__init__(message)
        self.seconds = seconds


class StoreError(DistilleryError):
    pass


class StoreUnavailable(StoreError):
    pass


class RowRefused(StoreError):
    pass


class ArtifactDamaged(StoreError):
    pass


class TrainingError(DistilleryError):
    pass


class TrainingUnavailable(TrainingError):
    pass


class ModelUnavailable(TrainingUnavailable):
    pass


class ExportError(DistilleryError):
    pass


class ModelError(DistilleryError):
    pass


class SchemaNotHeld(ModelError):
    pass


class AnswerStopped(ModelError):
    pass


class OutOfResources(ModelError):
    pass


class GateRefused(DistilleryError):
    """`run`: the name under which the run's records are kept."""

    def __init__(self, message: str, run: str = "") -> None:
        super().__init__(message)
        self.run = run


class StageError(DistilleryError):
    pass


class RegistryError(DistilleryError):
    pass


class ModelGone(RegistryError):
    pass


class RegistryUnavailable(RegistryError):
    pass


INFRASTRUCTURE_ERRORS = (StoreUnavailable, RegistryUnavailable, DataUnavailable, ModelUnavailable)
"""The only errors after which a whole stage is retried; calls of a teacher have their own."""

OUT_OF_MEMORY = re.compile(
    r"out ?of ?memory|memory ?error|bad[ _]alloc|alloc_failed|allocate .*memory", re.IGNORECASE
)
"""How Python, PyTorch, ONNX Runtime and the system say that memory is used up."""


def lacks_memory(error: object) -> bool:
    """Return whether an error, or what a process said at its end, tells that memory is used up."""
    return isinstance(error, MemoryError) or bool(OUT_OF_MEMORY.search(str(error)))


def one_line(error: object, most: int = 200) -> str:
    """Return the text of an error in one line of at most `most` characters: the cause within a
    message. What libraries and services say may have many lines, or hold a whole file."""
    text = " ".join(str(error).split())
    return text if len(text) <= most else f"{text[: most - 1]}…"


def named_line(error: BaseException) -> str:
    """Return an error as a line that stands for itself: a DistilleryError's message, which says
    what to do at its end; of any other error, its class and its text."""
    if isinstance(error, DistilleryError):
        return " ".join(str(error).split())
    return f"{type(error).__name__}: {one_line(error)}"

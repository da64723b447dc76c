"""Every error that a user can meet, as one tree. Each text is one line: the setting, file or row, and what to do.

DistilleryError
├── RecipeError               a recipe that can't be read, or asks for what can't be
├── DataError                 a row, file or column of the data set
├── CredentialsError          a key, endpoint name or login that is missing or refused
├── TeacherError              the teacher can't do what the recipe asks of it
│   ├── TeacherUnavailable    the endpoint does not answer, after all tries of a call
│   ├── BudgetReached         a cap of teacher.budget; what was answered is kept
│   └── TeacherChanged        the canary rows are answered otherwise than before
├── StoreError                the artifact store
│   ├── StoreUnavailable      does not answer (infrastructure: worth a retry)
│   └── ArtifactDamaged       a folder that is missing, half-written or does not match its digest
├── TrainingError             training can't start or gave no usable student
├── ExportError               Olive or ONNX Runtime produced no usable model
├── ModelError                a model folder that can't be loaded or asked
├── StageError                a stage has no cache key; a fault of Distillery's own
└── RegistryError             a model can't be registered, found or downloaded
    └── RegistryUnavailable   does not answer (infrastructure: worth a retry)
"""


class DistilleryError(Exception):
    """Base of all errors that the user can mend; printed as one line, without a traceback."""


class RecipeError(DistilleryError):
    pass


class DataError(DistilleryError):
    pass


class NoSuchRevision(DataError):
    """The hub answers, and has no such data set or revision."""


class CredentialsError(DistilleryError):
    pass


class TeacherError(DistilleryError):
    pass


class TeacherUnavailable(TeacherError):
    """`overloaded`: the endpoint is there, and refuses more than it can do (429)."""

    def __init__(self, message: str, overloaded: bool = False) -> None:
        super().__init__(message)
        self.overloaded = overloaded


class BudgetReached(TeacherError):
    pass


class TeacherChanged(TeacherError):
    pass


class StoreError(DistilleryError):
    pass


class StoreUnavailable(StoreError):
    pass


class ArtifactDamaged(StoreError):
    pass


class TrainingError(DistilleryError):
    pass


class ExportError(DistilleryError):
    pass


class ModelError(DistilleryError):
    pass


class StageError(DistilleryError):
    pass


class RegistryError(DistilleryError):
    pass


class RegistryUnavailable(RegistryError):
    pass


INFRASTRUCTURE_ERRORS = (StoreUnavailable, RegistryUnavailable)
"""The only errors for which a stage is tried again as a whole; calls of a teacher have had their own tries."""

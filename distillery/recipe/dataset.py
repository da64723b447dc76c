"""The dataset slice: where rows come from, and which of them train, validate and test."""

from glob import has_magic
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from distillery.recipe.base import Revision, Slice

Role = Literal["gold", "train", "validation", "test"]

Share = Annotated[float, Field(gt=0, lt=1)]


class Columns(Slice):
    """The source's column for each field of a row. The defaults are those of tau/commonsense_qa;
    with task.kind: classify, `question` is text and `answer` is label; with extract and generate,
    `question` is text and `answer` is answer."""

    id: str | None = "id"
    """Column of the row's id, which is unique within a split. null, or a column that the source
    lacks: ids are made from the rows' content."""

    question: str | None = "question"
    """Column of the question or text. null: the columns in dataset.fields, one a line."""

    concept: str | None = "question_concept"
    """Column of the question's topic. Optional: the source may lack it."""

    choices: str | None = "choices"
    """Column of the 2 to 26 options: {"label": [...], "text": [...]}, or a list of texts. In CSV,
    either as a JSON string. With task.kind: classify it is null, or names options whose texts are
    the classes; with extract and generate it is null."""

    answer: str = "answerKey"
    """Column of the right option's label or text, of the class, or of the answer as text; with
    task.kind: extract, of the JSON object or its text. It may be empty in rows of train that only
    the teacher labels; rows of gold, validation and test need it."""


class Rotation(Slice):
    """Test rows that are held back, so that fresh ones can take the place of those that have judged
    many versions.

    `rounds` intervals of the size carve.test follow each other where the test rows are carved. Rows
    of one of them are the test rows, and rows of the others serve for nothing until it is their
    turn. So no row of a later round has trained a student before it judges one.
    """

    rounds: int = Field(ge=2, le=100)
    """Intervals that are held back. carve.test: 0.05 with rounds: 4 keeps a fifth of the rows from
    training. It may be raised later; then a new round's rows have trained earlier versions, and
    cannot judge as long as one of these is the champion."""

    round: int = Field(0, ge=0)
    """The interval whose rows are the test rows, from 0. The next number brings fresh rows."""

    @model_validator(mode="after")
    def check_round(self) -> Self:
        if self.round >= self.rounds:
            raise ValueError(
                f"round: {self.round}, but with rounds: {self.rounds} the last is "
                f"{self.rounds - 1}; all rows that were held back have judged; carve others by "
                "another dataset.seed and registry.model_name, or raise rounds"
            )
        return self


class DatasetRecipe(Slice):
    """Where rows come from, and which split serves for what.

    A split has one of four roles. gold: labelled rows that a local teacher learns from. train:
    rows that the teacher labels for the student. validation: rows that choose epochs, forms and
    settings. test: rows that the scoreboard and the gate go by.
    """

    added_later: ClassVar[frozenset[str]] = frozenset({"rotation", "fields", "corrections"})

    source: Literal["sample", "hub", "files"] = "sample"
    """sample: the data set that is shipped. hub: the Hugging Face data set `name`. files:
    `files`."""

    name: str = ""
    """With source: hub, the data set's hub id, such as tau/commonsense_qa."""

    revision: Revision | None = None
    """With source: hub, a commit, tag or branch. By default the newest commit."""

    files: dict[str, tuple[str, ...]] = Field({})
    """With source: files, the JSONL, CSV or Parquet files of each split, by the split's name.
    A folder stands for all such files in it, and a pattern such as rows/*.csv for those that match;
    each run looks anew which these are. Relative paths start at the folder that the run starts
    in. A worker opens files below its DISTILLERY_DATA_FOLDERS alone."""

    corrections: tuple[str, ...] = ()
    """Files of rows whose answers replace those of the source, such as a doubtful.csv that you have
    corrected. A row is known by its text and its options. The columns are those of `columns`."""

    splits: dict[Role, str] = Field(
        {"gold": "gold", "train": "pool", "validation": "validation", "test": "test"}
    )
    """The source's split for each role: gold, train, validation, test. The defaults are the splits
    of the shipped sample; in a recipe that says its task.kind, the splits in `files` that are named
    like a role. train and test are required; test may be carved instead."""

    columns: Columns = Columns()
    """The source's column names."""

    fields: tuple[str, ...] = ()
    """Further columns of text that the prompt shows, such as [title, body]: in prompt.user, {title}
    becomes the column's text. A row may lack some of them, and all if it has a question or text."""

    carve: dict[Literal["gold", "validation", "test"], Share] = Field({})
    """Share (0 to 1) of the train rows with an answer that becomes gold, validation or test, for a
    source without that split. A hash of `seed` and the row decides, so that rows added later move
    none."""

    rotation: Rotation | None = None
    """With carve.test: more test rows that are held back for later, such as {rounds: 4, round: 0}.
    null: none are."""

    sample: dict[Role, Annotated[int, Field(gt=0)]] = Field({})
    """The most rows that a role takes. A hash of `seed` and the row decides which. By default
    all."""

    seed: int = 0
    """Decides which rows `carve` and `sample` take."""

    near_duplicate: float = Field(0.8, gt=0, le=1)
    """Similarity (Jaccard, of the questions' word triples and of the options) from which two rows
    count as copies. Of copies within train one is kept; copies of validation or test rows are
    dropped from train and gold, and copies of test rows from validation. 1: only where both sets
    are equal, which is the default with task.kind: extract and generate, where texts that differ in
    a name or a number have other answers."""

    @property
    def roles(self) -> frozenset[str]:
        """The roles that have rows: those that `splits` or `carve` name."""
        return frozenset({*self.splits, *self.carve})

    @property
    def title(self) -> str:
        """A short name for people: sample, the last part of the hub id, or the stem of a train
        file, or of the folder that a pattern starts in."""
        if self.source == "hub":
            return self.name.rpartition("/")[2]
        if self.source == "files":
            train_files = self.files.get(self.splits["train"], ())
            path = Path(next(iter(train_files), "files"))
            while has_magic(path.name):
                path = path.parent
            return path.stem or "files"
        return self.source

    @property
    def content_id(self) -> str:
        """The part of this slice in cache keys: files count by their content, not by their
        paths."""
        left_out = {"files", "corrections"}
        for name in self.added_later:
            if getattr(self, name) == type(self).model_fields[name].default:
                left_out.add(name)
        return self.model_dump_json(exclude=left_out)

    @model_validator(mode="after")
    def check_source(self) -> Self:
        if self.source == "hub" and not self.name:
            raise ValueError("source is hub: set dataset.name, such as tau/commonsense_qa")
        if self.source == "files" and not self.files:
            raise ValueError("source is files: set dataset.files, such as {train: [rows.jsonl]}")
        # Without this check the run would train on the sample's rows instead.
        if self.source != "files" and self.files:
            raise ValueError(
                f"files are given, but source is {self.source}: set dataset.source: files"
            )
        if self.source == "sample" and self.name:
            raise ValueError("a name is given, but source is sample: set dataset.source: hub")
        if self.rotation and "test" not in self.carve:
            raise ValueError("rotation needs a test split in dataset.carve, such as {test: 0.05}")
        if self.columns.question is None and not self.fields:
            raise ValueError("columns.question is null: name the columns to show in fields")
        if "train" not in self.splits:
            raise ValueError("dataset.splits names no train split; add one, such as train: train")
        return self

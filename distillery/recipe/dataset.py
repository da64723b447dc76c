"""recipe/dataset"""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from distillery.recipe.base import Slice


class Columns(Slice):
    """Which column of the source holds what; the defaults are those of tau/commonsense_qa."""

    id: str | None = "id"
    question: str = "question"
    concept: str | None = "question_concept"
    choices: str = "choices"
    answer: str = "answerKey"


class DatasetRecipe(Slice):
    """Where rows come from and which split serves for what.

    `splits` maps a role (gold, train, validation, test) to a split of the source. A role that is not there may
    be carved out of train by `carve` (share of rows). `sample` caps a role's rows. Carving and sampling go by a hash of
    `seed` and the row's content, so that adding rows moves none.
    """

    source: Literal["sample", "hub", "files"] = Field(
        "sample", description="The shipped sample, a hub data set or files"
    )
    name: str = Field("", description="Hub name, such as tau/commonsense_qa")
    revision: str | None = Field(None, description="Hub revision: a commit, tag or branch")
    files: dict[str, tuple[str, ...]] = Field(
        {}, description="Split name to JSONL, CSV or Parquet files"
    )
    splits: dict[Literal["gold", "train", "validation", "test"], str] = Field(
        {"gold": "gold", "train": "pool", "validation": "validation", "test": "test"}
    )
    columns: Columns = Columns()
    carve: dict[Literal["gold", "validation", "test"], Annotated[float, Field(gt=0, lt=1)]] = Field(
        {}
    )
    sample: dict[Literal["gold", "train", "validation", "test"], Annotated[int, Field(gt=0)]] = (
        Field({})
    )
    seed: int = 0
    near_duplicate: float = Field(
        0.8,
        gt=0,
        le=1,
        description="Jaccard of word triples: rows of train this alike count as one",
    )

    @property
    def title(self) -> str:
        """A short name of the data for people: sample, the hub data set's last part, or the train file's stem."""
        if self.source == "hub":
            return self.name.rpartition("/")[2]
        if self.source == "files":
            return Path(next(iter(self.files.get(self.splits["train"], ())), "files")).stem
        return self.source

    @property
    def content_id(self) -> str:
        """What of this slice is in cache keys: files count by their content, not by their paths."""
        return self.model_dump_json(exclude={"files"})

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.source == "hub" and not self.name:
            raise ValueError("source is hub: set dataset.name, such as tau/commonsense_qa")
        if self.source == "files" and not self.files:
            raise ValueError("source is files: set dataset.files, such as {train: [rows.jsonl]}")
        # Rows that nobody asked for would be trained on.
        if self.source != "files" and self.files:
            raise ValueError(
                f"files are given, but source is {self.source}: set dataset.source: files"
            )
        if self.source == "sample" and self.name:
            raise ValueError("a name is given, but source is sample: set dataset.source: hub")
        if "train" not in self.splits:
            raise ValueError("dataset.splits names no train split")
        return self

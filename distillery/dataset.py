"""Rows of a hub data set, of local files or of the shipped sample: validated, split, free of copies and leaks.

Columns in, named in dataset.columns, by default those of tau/commonsense_qa:
  id             text or whole number; the content's hash where the column is not there
  question       text
  question_concept   text, optional
  choices        {"label": [...], "text": [...]} or a list of texts, 2 to 26; also either as a JSON string (CSV);
                 texts may repeat, as in one row of 75 of CommonsenseQA: it is the letter that is asked for
  answerKey      one of the labels, which become letters by position; empty or missing where unknown
Files out: `<role>.jsonl` for the roles gold, train, validation, test, one records.Example a line.

A row's *content* is its question and its options, whatever their order, without regard to case, width of characters and
white space. Its *place* in [0, 1) is a hash of the recipe's seed and that content, so copies share a place, and neither
other rows nor a corrected answer move one. Carving gives consecutive intervals of places to gold, validation and test,
in this order, and the rest to train; sampling keeps the lowest places. Files out are sorted by place: the order of the
source's rows changes nothing.

Copies. Two rows are *alike* where the sets of word triples of their questions, and the sets of their options, both have
a Jaccard similarity of dataset.near_duplicate or more; a question of fewer than three words, or in a script without
spaces, is like its equals only. Within train, of rows with equal content, then of rows alike, the one of the lowest
place stays. Rows of train or gold with the content of a validation or test row stop the run; carved from one source
they can't be apart, as they share a place. Rows of train or gold that are merely alike to a validation or test row, of
the same source or another, are dropped and counted among the near duplicates. Duplicates within gold, validation and
test stay, so that adding rows takes none away. All of this comes before sampling: a test row that is not sampled today
trains no student either.
"""

import csv
import glob
import hashlib
import json
import logging
import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.resources import files
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, cast

from pydantic import ValidationError

from distillery.errors import DataError, NoSuchRevision, RecipeError
from distillery.recipe import Columns, DatasetRecipe
from distillery.records import LETTERS, Example, Record, Split, digest_of
from distillery.settings import LocalSettings
from distillery.store import sha256_of, working_folder

ROLES = ("gold", "train", "validation", "test")
_FITTED = ("gold", "train")
_JUDGED = ("validation", "test")
_LISTED = 20
_SURROGATE = re.compile("[\ud800-\udfff]")
_log = logging.getLogger(__name__)


class PreparedCounts(Record):
    """`splits` by role; rows that were dropped because their content, or nearly so, stands in the data already."""

    splits: dict[str, Split]
    duplicates_dropped: int = 0
    near_duplicates_dropped: int = 0


class _Table(NamedTuple):
    """One file, or one split of a hub data set, as read: (where, values) a row; where is FILE:LINE, or for Parquet and
    the hub FILE:ROW, both from 1."""

    name: str
    columns: Sequence[str]
    rows: list[tuple[str, dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class _Row:
    where: str
    example: Example
    content: str
    place: float


_Splits = dict[str, list[_Row]]


def prepare(recipe: DatasetRecipe, out: Path) -> PreparedCounts:
    """Writes `<role>.jsonl` into `out` for each role that the recipe's splits and carve name; see the module's text.

    Raises DataError (a file, row or column), RecipeError (splits, carve and sample at odds). Writes all or nothing.
    """
    _check_roles(recipe)
    splits = _carve(recipe, _load(recipe))
    _refuse_leaks(splits)
    splits, copies = _drop_copies(splits)
    _refuse_shared_ids(splits)
    splits, near = _drop_alike(splits, recipe.near_duplicate)
    limits: dict[str, int] = dict(recipe.sample.items())
    splits = {role: rows[: limits.get(role)] for role, rows in splits.items()}
    _refuse_empty(splits)
    out.mkdir(parents=True, exist_ok=True)
    written = {role: _write(out / f"{role}.jsonl", splits[role]) for role in ROLES if role in splits}
    return PreparedCounts(splits=written, duplicates_dropped=copies, near_duplicates_dropped=near)


def source_identity(recipe: DatasetRecipe) -> str:
    """What stands for the source's content in a cache key: a digest of the files, or the hub's commit.

    Where the hub doesn't answer, a revision stands for itself. Raises DataError where a file can't be read, or where
    there is no revision either."""
    if recipe.source == "hub":
        try:
            commit = _commit(recipe)
        except DataError as error:
            if not recipe.revision or isinstance(error, NoSuchRevision):
                raise
            _log.warning("%s; going on with what is here of revision %s", error, recipe.revision)
            commit = recipe.revision
        return f"{recipe.name}@{commit}"
    if recipe.source == "files":
        paths = [Path(file).expanduser() for split in sorted(recipe.files) for file in recipe.files[split]]
    else:
        paths = sorted(
            path for path in Path(str(files("distillery") / "sample_data")).iterdir() if path.suffix == ".jsonl"
        )
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise DataError(f"{missing[0]}: no such file; correct dataset.files")
    splits = {split: len(recipe.files[split]) for split in sorted(recipe.files)}
    return digest_of([splits, *(sha256_of(path) for path in paths)])


def _commit(recipe: DatasetRecipe) -> str:
    """The commit that dataset.revision names, which a branch does not for long; without one, the newest."""
    if recipe.revision and re.fullmatch("[0-9a-f]{40}", recipe.revision):
        return recipe.revision
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        return str(HfApi().dataset_info(recipe.name, revision=recipe.revision, timeout=10).sha)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        at = f" with revision {recipe.revision}" if recipe.revision else ""
        raise NoSuchRevision(
            f"dataset.name: the hub has no {recipe.name}{at}, or HF_TOKEN may not read it; correct it"
        ) from error
    except Exception as error:
        raise DataError(
            f"dataset.name: the hub doesn't answer for {recipe.name} ({type(error).__name__}); check name and network, "
            "or use local files (dataset.source: files)"
        ) from error


def read_examples(path: Path) -> list[Example]:
    """The rows of a file that `prepare` wrote. Raises DataError with the file and line."""
    return list(each_example(path))


def each_example(path: Path) -> Iterator[Example]:
    """The same, one at a time."""
    try:
        with path.open(encoding="utf-8", newline="\n") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _example(line, f"{path}:{number}")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read ({_cause(error)}); prepare the data set again") from error


def _example(line: str, where: str) -> Example:
    try:
        return Example.model_validate_json(line)
    except ValidationError as error:
        detail = error.errors()[0]
        field = ".".join(str(part) for part in detail["loc"]) or "line"
        raise DataError(f"{where}: {field}: {detail['msg']}; prepare the data set again") from error


def read_columns(paths: Sequence[str], wanted: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, values) of each row of JSONL, CSV or Parquet files that have the columns in `wanted`, which says of each
    what it is. Raises DataError with the file and column."""
    for table in _file_tables("teacher.files", paths):
        for where, values in table.rows:
            for name, meaning in wanted.items():
                if values.get(name) in (None, ""):
                    raise DataError(f"{where}: {name}: missing; it is {meaning}")
            yield where, values


def to_example(values: dict[str, Any], columns: Columns, where: str) -> Example:
    """One row, as `prepare` reads it; the answer may be missing. Raises DataError, which starts with `where`."""
    identified = columns.id is not None and columns.id in values
    return _row(where, values, columns, 0, identified).example


def _check_roles(recipe: DatasetRecipe) -> None:
    for role in recipe.carve:
        if role in recipe.splits:
            raise RecipeError(f"dataset.carve.{role}: dataset.splits.{role} names a split already; remove one of them")
    for sampled in sorted(set(recipe.sample) - {*recipe.splits, *recipe.carve}):
        raise RecipeError(f"dataset.sample.{sampled}: no such split; name it in dataset.splits or dataset.carve")
    if sum(recipe.carve.values()) >= 1:
        raise RecipeError(f"dataset.carve: the shares add up to {sum(recipe.carve.values()):g}; leave some for train")


# Reading


def _load(recipe: DatasetRecipe) -> _Splits:
    """The validated rows of the roles in dataset.splits, in order of place."""
    source = _open(recipe)
    splits: _Splits = {}
    for role, name in recipe.splits.items():
        if name not in source:
            raise DataError(
                f"dataset.splits.{role}: the source has no split {name!r}, only {', '.join(source)}; "
                f"correct dataset.splits or take a share of train by dataset.carve"
            )
        rows = [row for table in source[name]() for row in _validate(table, recipe, role)]
        splits[role] = _named(sorted(rows, key=_order))
    return splits


def _open(recipe: DatasetRecipe) -> dict[str, Callable[[], Iterator[_Table]]]:
    """A reader for each split of the source, by the split's name."""
    if recipe.source == "hub":
        return {name: partial(_hub_table, recipe.name, name, rows) for name, rows in _hub(recipe).items()}
    if recipe.source == "files":
        return {name: partial(_file_tables, f"dataset.files.{name}", paths) for name, paths in recipe.files.items()}
    folder = Path(str(files("distillery") / "sample_data"))
    names = ("gold", "pool", "validation", "test")
    return {name: partial(_file_tables, f"dataset.files.{name}", (str(folder / f"{name}.jsonl"),)) for name in names}


def _datasets() -> Any:
    """Hugging Face `datasets`, kept from drawing bars and from logging what it raises as well."""
    import datasets
    from datasets.utils.logging import set_verbosity
    from datasets.utils.tqdm import disable_progress_bars as disable_datasets_bars
    from huggingface_hub.utils.logging import set_verbosity as set_hub_verbosity
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    disable_datasets_bars()
    set_verbosity(logging.CRITICAL)
    set_hub_verbosity(logging.ERROR)
    return datasets


def _hub(recipe: DatasetRecipe) -> dict[str, Any]:
    """The splits of the hub's data set, at the commit that dataset.revision names. Cached by name and revision: without
    a connection, `datasets` takes whichever commit it finds in its cache."""
    import huggingface_hub.errors

    datasets, hub_errors = _datasets(), cast(Any, huggingface_hub.errors)
    asked = recipe.name + (f" at {recipe.revision}" if recipe.revision else "")
    cache = LocalSettings().folder / "datasets" / digest_of([recipe.name, recipe.revision])[:16]
    revision = recipe.revision
    with suppress(DataError):
        # Else what is wrong is said below.
        revision = _commit(recipe)
    try:
        loaded: dict[str, Any] = datasets.load_dataset(recipe.name, revision=revision, cache_dir=str(cache))
    except (datasets.exceptions.DatasetNotFoundError, hub_errors.RepositoryNotFoundError) as error:
        raise DataError(
            f"dataset.name: {asked} is not on the hub, or needs a login; "
            f"correct dataset.name or dataset.revision, or set HF_TOKEN"
        ) from error
    except (OSError, ValueError, RuntimeError, hub_errors.HTTPError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"dataset.name: {asked} could not be had from the hub ({_cause(error)}); "
            f"check the name and the connection, or set dataset.source to files and dataset.files to local copies"
        ) from error
    return loaded


def _hub_table(name: str, split: str, rows: Any) -> Iterator[_Table]:
    title = f"{name} ({split})"
    yield _Table(title, rows.column_names, [(f"{title}:{n}", row) for n, row in enumerate(rows.to_list(), 1)])


def _file_tables(setting: str, paths: Sequence[str]) -> Iterator[_Table]:
    readers = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
    for path in (Path(path).expanduser() for path in paths):
        if path.suffix.lower() not in readers:
            raise DataError(f"{path}: {setting} takes {', '.join(readers)}, not {path.suffix or 'a bare name'!r}")
        try:
            with path.open("rb") as file:
                empty = not file.read(1)
        except OSError as error:
            raise DataError(f"{path}: can't be read ({error.strerror}); correct {setting}") from error
        table = None if empty else readers[path.suffix.lower()](path)
        if not table or not table.rows:
            raise DataError(f"{path}: empty, without a single row; correct {setting}")
        yield table


def _jsonl(path: Path) -> _Table:
    # Read as text and parsed here: `datasets` would guess types by column (dates, numbers) and lose the lines.
    rows = []
    for number, row in enumerate(_from_file("from_text", path, encoding="utf-8-sig"), 1):
        if row["text"].strip():
            rows.append((f"{path}:{number}", _json_object(row["text"], f"{path}:{number}")))
    return _Table(str(path), list(dict.fromkeys(key for _, values in rows for key in values)), rows)


def _json_object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise DataError(f"{where}: no JSON object ({error}); write one row a line") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: no JSON object but {type(value).__name__}; write one row a line")
    return value


def _csv(path: Path) -> _Table:
    header, lines = _csv_lines(path)
    if not lines:
        return _Table(str(path), header, [])
    # Every column as text, nothing taken for a missing value: 'NA', 'null' and '007' stay what they are.
    datasets = _datasets()
    features = datasets.Features({name: datasets.Value("string") for name in header})
    rows = _from_file("from_csv", path, encoding="utf-8-sig", features=features, na_filter=False)
    if len(rows) != len(lines):
        raise DataError(f"{path}: {len(lines)} rows by its quotes but {len(rows)} read; check the quotes")
    return _Table(str(path), header, [(f"{path}:{line}", row) for line, row in zip(lines, rows, strict=True)])


def _csv_lines(path: Path) -> tuple[list[str], list[int]]:
    """The header and the line (from 1) that each row starts on; rows may span lines."""
    lines: list[int] = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next((values for values in reader if values), [])
            if len(set(header)) != len(header):
                raise DataError(f"{path}:1: two columns of one name among {', '.join(header)}; rename one")
            start = reader.line_num + 1
            for values in reader:
                if values and len(values) != len(header):
                    raise DataError(
                        f"{path}:{start}: {len(values)} values under {len(header)} columns; quote a value with a comma"
                    )
                lines += [start] if values else []
                start = reader.line_num + 1
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: no valid CSV ({error}); check the quotes") from error
        except UnicodeDecodeError as error:
            raise _not_utf8(path) from error
    return header, lines


def _parquet(path: Path) -> _Table:
    rows = _from_file("from_parquet", path)
    columns = list(rows[0]) if rows else []
    return _Table(str(path), columns, [(f"{path}:{number}", row) for number, row in enumerate(rows, 1)])


def _from_file(method: str, path: Path, **options: Any) -> list[dict[str, Any]]:
    """Rows of a file through `datasets`. Its cache lives and dies with the call, so that no changed file is missed."""
    datasets = _datasets()
    with working_folder("dataset") as scratch:
        try:
            read = getattr(datasets.Dataset, method)
            table = read(glob.escape(str(path)), cache_dir=str(scratch), keep_in_memory=True, **options)
            rows: list[dict[str, Any]] = table.to_list()
        except (OSError, ValueError, RuntimeError, NotImplementedError, datasets.exceptions.DatasetsError) as error:
            if isinstance(error.__cause__, UnicodeDecodeError) or isinstance(error, UnicodeDecodeError):
                raise _not_utf8(path) from error
            raise DataError(f"{path}: can't be read as {path.suffix[1:].lower()} ({_cause(error)})") from error
    return rows


def _not_utf8(path: Path) -> DataError:
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            line.decode()
        except UnicodeDecodeError:
            return DataError(f"{path}:{number}: not UTF-8; save the file in that encoding")
    return DataError(f"{path}: not UTF-8; save the file in that encoding")


def _cause(error: BaseException) -> str:
    """The innermost reason in one short line."""
    while error.__cause__:
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:199] + "…"


# Validating


def _validate(table: _Table, recipe: DatasetRecipe, role: str) -> list[_Row]:
    columns = recipe.columns
    needed = {"question": columns.question, "choices": columns.choices}
    if role != "train":
        needed["answer"] = columns.answer
    for setting, column in needed.items():
        if column not in table.columns:
            raise DataError(
                f"{table.name}: no column {column!r}, only {', '.join(map(repr, table.columns))}; "
                f"set dataset.columns.{setting} to the one that is meant"
            )
    identified = columns.id is not None and columns.id in table.columns
    rows = [_row(where, values, columns, recipe.seed, identified) for where, values in table.rows]
    for row in rows:
        _refuse_unanswered(row, columns.answer, role)
    return rows


def _row(where: str, values: dict[str, Any], columns: Columns, seed: int, identified: bool) -> _Row:
    question = _text(values.get(columns.question), where, columns.question)
    labels, choices = _options(values.get(columns.choices), where, columns.choices)
    concept = values.get(columns.concept) if columns.concept else None
    content = digest_of([_normal(question), sorted(_normal(choice) for choice in choices)])
    example = Example(
        example_id=_text(values.get(str(columns.id)), where, str(columns.id)) if identified else content,
        question=question,
        concept="" if concept in (None, "") else _text(concept, where, str(columns.concept)),
        choices=choices,
        answer_key=_answer(values.get(columns.answer), labels, where, columns.answer),
    )
    return _Row(where, example, content, _place(seed, content))


def _text(value: Any, where: str, field: str) -> str:
    """The text without white space around it; a whole number counts as text."""
    if value is None:
        raise DataError(f"{where}: {field}: missing; fill it in or remove the row")
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(f"{where}: {field}: {type(value).__name__} where text belongs; correct the row")
    text = str(value).strip()
    if not text:
        raise DataError(f"{where}: {field}: empty; fill it in or remove the row")
    if _SURROGATE.search(text):
        raise DataError(f"{where}: {field}: half of a surrogate pair, which is no character; correct the row")
    return text


def _options(value: Any, where: str, field: str) -> tuple[list[str], tuple[str, ...]]:
    """The labels and the texts of a row's options."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise DataError(
                f'{where}: {field}: no JSON ({error}); write {{"label": [...], "text": [...]}} or a list of texts'
            ) from error
    labels, texts = (value.get("label"), value.get("text")) if isinstance(value, dict) else (None, value)
    if not isinstance(texts, list):
        raise DataError(f'{where}: {field}: neither {{"label": [...], "text": [...]}} nor a list of texts')
    if not 2 <= len(texts) <= len(LETTERS):
        raise DataError(f"{where}: {field}: {len(texts)} options; there must be 2 to {len(LETTERS)}")
    choices = tuple(_text(text, where, f"{field}: option {n}") for n, text in enumerate(texts, 1))
    return _labels(labels, len(choices), where, field), choices


def _labels(labels: Any, count: int, where: str, field: str) -> list[str]:
    if labels is None:
        return list(LETTERS[:count])
    if not isinstance(labels, list) or len(labels) != count:
        raise DataError(f"{where}: {field}: the labels are not as many as the {count} texts; correct the row")
    texts = [_text(label, where, f"{field}: label {n}") for n, label in enumerate(labels, 1)]
    if len(set(texts)) < count:
        raise DataError(f"{where}: {field}: two options of one label among {', '.join(texts)}; correct the row")
    return texts


def _answer(value: Any, labels: list[str], where: str, field: str) -> str | None:
    """The letter of the label that `value` names; None where it is empty."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    label = _text(value, where, field)
    if label not in labels:
        raise DataError(f"{where}: {field}: {label!r} is no option; the options are {', '.join(labels)}")
    return LETTERS[labels.index(label)]


def _refuse_unanswered(row: _Row, field: str, role: str) -> None:
    if role != "train" and row.example.answer_key is None:
        raise DataError(
            f"{row.where}: {field}: empty, but rows of {role} need an answer; "
            f"fill it in, or set dataset.splits.{role} to a split with answers"
        )


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _place(seed: int, content: str) -> float:
    """A number in [0, 1): SHA-256 of seed and content, divided by 2^256."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{content}".encode()).digest()) / 2**256


def _order(row: _Row) -> tuple[float, bool, str]:
    """By place; of equal content, the row with an answer first."""
    return row.place, row.example.answer_key is None, row.example.model_dump_json()


def _named(rows: list[_Row]) -> list[_Row]:
    """Ids that are content hashes made unique: a second row of equal content gets -2, and so on."""
    seen: Counter[str] = Counter()
    named = []
    for row in rows:
        if row.example.example_id == row.content:
            seen[row.content] += 1
            if seen[row.content] > 1:
                example = row.example.model_copy(update={"example_id": f"{row.content}-{seen[row.content]}"})
                row = replace(row, example=example)
        named.append(row)
    return named


# Splitting


def _carve(recipe: DatasetRecipe, splits: _Splits) -> _Splits:
    shares: dict[str, float] = dict(recipe.carve.items())
    carved: _Splits = {role: [] for role in ROLES if role in shares}
    edges = list(zip(accumulate(shares[role] for role in carved), carved, strict=True))
    train: list[_Row] = []
    for row in splits["train"]:
        role = next((role for edge, role in edges if row.place < edge), "train")
        _refuse_unanswered(row, recipe.columns.answer, role)
        (train if role == "train" else carved[role]).append(row)
    return {**splits, **carved, "train": train}


def _refuse_leaks(splits: _Splits) -> None:
    judged = {row.content: (role, row) for role in _JUDGED for row in splits.get(role, [])}
    for role in _FITTED:
        leaks = [row for row in splits.get(role, []) if row.content in judged]
        if leaks:
            pairs = [_pair(row, *judged[row.content]) for row in leaks[:_LISTED]]
            more = f" and {len(leaks) - _LISTED} more" if len(leaks) > _LISTED else ""
            raise DataError(
                f"{leaks[0].where}: {len(leaks)} rows of {role} also stand in validation or test: "
                f"{', '.join(pairs)}{more}; remove them from one of the two"
            )


def _pair(row: _Row, role: str, twin: _Row) -> str:
    return f"{row.example.example_id} (= {role} {twin.example.example_id})"


def _drop_copies(splits: _Splits) -> tuple[_Splits, int]:
    train = list({row.content: row for row in reversed(splits["train"])}.values())[::-1]
    return {**splits, "train": train}, len(splits["train"]) - len(train)


def _refuse_shared_ids(splits: _Splits) -> None:
    """An id stands for one row: once in a split, and in two splits only for the same content."""
    first: dict[str, _Row] = {}
    for role, rows in splits.items():
        own: dict[str, _Row] = {}
        for row in rows:
            key = row.example.example_id
            other = own.get(key) or first.get(key, row)
            if key in own or other.content != row.content:
                where, again = sorted((other.where, row.where), key=_natural)
                raise DataError(
                    f"{again}: id: {key!r} of {role} is that of {where} too; make ids unique, "
                    f"or set dataset.columns.id to null to name rows by their content"
                )
            own[key] = row
        first |= own


def _natural(where: str) -> tuple[str, int]:
    name, _, line = where.rpartition(":")
    return name, int(line)


def _refuse_empty(splits: _Splits) -> None:
    for role, rows in splits.items():
        if not rows:
            raise DataError(
                f"dataset: no row is left for {role} after carving and dropping rows alike to those of another split; "
                f"add rows, or change dataset.carve or dataset.near_duplicate"
            )


def _drop_alike(splits: _Splits, threshold: float) -> tuple[_Splits, int]:
    alike = _Alike(threshold, (row for rows in splits.values() for row in rows))
    for row in (row for role in _JUDGED for row in splits.get(role, [])):
        alike.add(alike.sets(row))
    kept = dict(splits)
    for role in (role for role in _FITTED if role in splits):
        kept[role] = []
        for row in splits[role]:
            sets = alike.sets(row)
            if not alike.knows(sets):
                kept[role].append(row)
                if role == "train":
                    alike.add(sets)
    return kept, sum(len(splits[role]) - len(kept[role]) for role in splits)


_Sets = tuple[frozenset[int], frozenset[int]]


class _Alike:
    """Finds rows that are alike (see the module's text) exactly, by prefix filtering.

    Sets of similarity t share one of the n - ceil(t n) + 1 rarest tokens of each (n tokens): Bayardo, Ma, Srikant:
    Scaling up all pairs similarity search, WWW 2007. The index holds these tokens only. Where questions and options
    each have similarity t, so has their union, on which the filter works.
    """

    def __init__(self, threshold: float, rows: Iterable[_Row]) -> None:
        self._threshold = threshold
        counts = Counter(token for row in rows for part in _tokens(row.example) for token in part)
        self._rank = {token: rank for rank, token in enumerate(sorted(counts, key=counts.__getitem__))}
        self._index: defaultdict[int, list[_Sets]] = defaultdict(list)

    def sets(self, row: _Row) -> _Sets:
        """The tokens of question and options by rank, the rarest being 0."""
        question, options = _tokens(row.example)
        return frozenset(map(self._rank.__getitem__, question)), frozenset(map(self._rank.__getitem__, options))

    def add(self, sets: _Sets) -> None:
        for rank in self._rarest(sets):
            self._index[rank].append(sets)

    def knows(self, sets: _Sets) -> bool:
        """Whether a row alike was added."""
        return any(self._similar(sets, other) for rank in self._rarest(sets) for other in self._index.get(rank, ()))

    def _rarest(self, sets: _Sets) -> list[int]:
        ranks = sorted(sets[0] | sets[1])
        return ranks[: len(ranks) - math.ceil(self._threshold * len(ranks) - 1e-9) + 1]

    def _similar(self, one: _Sets, other: _Sets) -> bool:
        for a, b in zip(one, other, strict=True):
            common = len(a & b)
            if common < self._threshold * (len(a) + len(b) - common) - 1e-9:
                return False
        return True


def _tokens(example: Example) -> tuple[set[str], set[str]]:
    """The word triples of the question and the options, marked apart."""
    text = _normal(example.question)
    words = re.findall(r"\w+", text) or [text]
    triples = {" ".join(words[i : i + 3]) for i in range(max(1, len(words) - 2))}
    return triples, {f"\n{_normal(choice)}" for choice in example.choices}


def _write(path: Path, rows: list[_Row]) -> Split:
    path.write_text("".join(f"{row.example.model_dump_json()}\n" for row in rows), encoding="utf-8", newline="\n")
    return Split(file=path.name, rows=len(rows), sha256=sha256_of(path))

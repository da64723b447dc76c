"""data/splits"""

from itertools import accumulate

from distillery.data.rows import FITTED, JUDGED, MOST_LISTED, ROLES, Row, Splits, refuse_unanswered
from distillery.errors import DataError
from distillery.recipe import DatasetRecipe

# Splitting


def carve(recipe: DatasetRecipe, splits: Splits) -> Splits:
    shares: dict[str, float] = dict(recipe.carve.items())
    carved: Splits = {role: [] for role in ROLES if role in shares}
    edges = list(zip(accumulate(shares[role] for role in carved), carved, strict=True))
    train: list[Row] = []
    for row in splits["train"]:
        role = next((role for edge, role in edges if row.place < edge), "train")
        refuse_unanswered(row, recipe.columns.answer, role)
        (train if role == "train" else carved[role]).append(row)
    return {**splits, **carved, "train": train}


def refuse_leaks(splits: Splits) -> None:
    judged = {row.content: (role, row) for role in JUDGED for row in splits.get(role, [])}
    for role in FITTED:
        leaks = [row for row in splits.get(role, []) if row.content in judged]
        if leaks:
            pairs = [_pair(row, *judged[row.content]) for row in leaks[:MOST_LISTED]]
            more = f" and {len(leaks) - MOST_LISTED} more" if len(leaks) > MOST_LISTED else ""
            raise DataError(
                f"{leaks[0].where}: {len(leaks)} rows of {role} also stand in validation or test: "
                f"{', '.join(pairs)}{more}; remove them from one of the two"
            )


def _pair(row: Row, role: str, twin: Row) -> str:
    return f"{row.example.example_id} (= {role} {twin.example.example_id})"


def drop_copies(splits: Splits) -> tuple[Splits, int]:
    train = list({row.content: row for row in reversed(splits["train"])}.values())[::-1]
    return {**splits, "train": train}, len(splits["train"]) - len(train)


def refuse_shared_ids(splits: Splits) -> None:
    """An id stands for one row: once in a split, and in two splits only for the same content."""
    first: dict[str, Row] = {}
    for role, rows in splits.items():
        own: dict[str, Row] = {}
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


def refuse_empty(splits: Splits) -> None:
    for role, rows in splits.items():
        if not rows:
            raise DataError(
                f"dataset: no row is left for {role} after carving and dropping rows alike to those of another split; "
                f"add rows, or change dataset.carve or dataset.near_duplicate"
            )

"""Keep the sums of the calls, which budgets read at each allowance. Triggers add each new call, so
that the sums are right whoever writes it.

A later migration that copies teacher_calls, as Alembic's batch mode does on SQLite, loses the
trigger and must make it again."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"

COLUMNS = "run, recipe, section, day, currency, cost, tokens, calls"

VALUES = """
    {call}.run, {call}.recipe,
    CASE substr({call}.teacher, 1, 6) WHEN 'judge:' THEN 'evaluation.judge' ELSE 'teacher' END,
    {day}, coalesce({currency}, ''),
    coalesce({call}.cost, 0), {call}.prompt_tokens + {call}.completion_tokens, 1
"""
"""What a call adds."""

DIALECTS = {
    "sqlite": {
        "day": "substr({call}.called_at, 1, 10)",
        "currency": "json_extract({call}.prices, '$.currency')",
    },
    "postgresql": {
        "day": "to_char({call}.called_at AT TIME ZONE 'UTC', 'YYYY-MM-DD')",
        "currency": "{call}.prices ->> 'currency'",
    },
}

ADD = """
    INSERT INTO teacher_spending ({columns}) {rows}
    ON CONFLICT (run, recipe, section, day, currency) DO UPDATE SET
        cost = teacher_spending.cost + excluded.cost,
        tokens = teacher_spending.tokens + excluded.tokens,
        calls = teacher_spending.calls + excluded.calls
"""

TRIGGERS = {
    "sqlite": [
        """
        CREATE TRIGGER teacher_calls_spending AFTER INSERT ON teacher_calls
        BEGIN {add}; END
        """
    ],
    "postgresql": [
        """
        CREATE FUNCTION add_teacher_spending() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN {add}; RETURN NULL; END $$
        """,
        """
        CREATE TRIGGER teacher_calls_spending AFTER INSERT ON teacher_calls
        FOR EACH ROW EXECUTE FUNCTION add_teacher_spending()
        """,
    ],
}


def upgrade() -> None:
    op.create_table(
        "teacher_spending",
        sa.Column("run", sa.Text, primary_key=True),
        sa.Column("recipe", sa.Text, primary_key=True),
        sa.Column("section", sa.Text, primary_key=True),
        sa.Column("day", sa.String(10), primary_key=True),
        sa.Column("currency", sa.Text, primary_key=True),
        sa.Column("cost", sa.Float, nullable=False),
        sa.Column("tokens", sa.BigInteger, nullable=False),
        sa.Column("calls", sa.BigInteger, nullable=False),
    )
    op.create_index("ix_teacher_spending_recipe_day", "teacher_spending", ["recipe", "day"])
    dialect = op.get_bind().dialect.name

    def values(call: str) -> str:
        parts = {name: part.format(call=call) for name, part in DIALECTS[dialect].items()}
        return VALUES.format(call=call, **parts)

    add = ADD.format(columns=COLUMNS, rows=f"VALUES ({values('NEW')})")
    for statement in TRIGGERS[dialect]:
        op.execute(statement.format(add=add))
    # After the trigger, which waits for calls that are being written and keeps further ones out
    # until all is committed: each call is counted once.
    earlier = f"SELECT {values('teacher_calls')} FROM teacher_calls"  # noqa: S608 - constants
    op.execute(
        f"""
        INSERT INTO teacher_spending ({COLUMNS})
        WITH each_call ({COLUMNS}) AS ({earlier})
        SELECT run, recipe, section, day, currency, sum(cost), sum(tokens), sum(calls)
        FROM each_call GROUP BY run, recipe, section, day, currency
        """  # noqa: S608
    )
    # Only budgets looked calls up by their recipes.
    op.drop_index("ix_teacher_calls_recipe_called_at", "teacher_calls")

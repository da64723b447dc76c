"""Keep the sums of the calls, which budgets read at each allowance."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"

SPENT = """
INSERT INTO teacher_spending (run, recipe, section, day, currency, cost, tokens, calls)
SELECT run, recipe, section, day, currency, sum(cost), sum(tokens), count(*)
FROM (
    SELECT run, recipe, {day} AS day, coalesce({currency}, '') AS currency,
        CASE substr(teacher, 1, 6) WHEN 'judge:' THEN 'evaluation.judge' ELSE 'teacher' END
            AS section,
        coalesce(cost, 0) AS cost, prompt_tokens + completion_tokens AS tokens
    FROM teacher_calls
) AS each_call
GROUP BY run, recipe, section, day, currency
"""

DIALECTS = {
    "sqlite": {"day": "substr(called_at, 1, 10)", "currency": "json_extract(prices, '$.currency')"},
    "postgresql": {
        "day": "to_char(called_at AT TIME ZONE 'UTC', 'YYYY-MM-DD')",
        "currency": "prices ->> 'currency'",
    },
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
    op.execute(SPENT.format(**DIALECTS[op.get_bind().dialect.name]))
    # Only budgets looked calls up by their recipes.
    op.drop_index("ix_teacher_calls_recipe_called_at", "teacher_calls")

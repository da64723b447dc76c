"""Keep what each process may spend of a budget that several share."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.create_table(
        "budget_allowances",
        sa.Column("holder", sa.String(64), primary_key=True),
        sa.Column("run", sa.Text, nullable=False),
        sa.Column("recipe", sa.Text, nullable=False),
        sa.Column("section", sa.Text, nullable=False),
        sa.Column("cost", sa.Float, nullable=False),
        sa.Column("tokens", sa.Float, nullable=False),
        sa.Column("calls", sa.Float, nullable=False),
        sa.Column("expires_at", sa.Float, nullable=False),
    )
    # What a recipe's runs have spent in a period is added up again and again.
    op.create_index("ix_teacher_calls_recipe_called_at", "teacher_calls", ["recipe", "called_at"])

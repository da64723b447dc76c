"""Keep the lists of work that processes share."""

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    op.create_table(
        "shared_lists",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("numbers", sa.Text, nullable=False),
        sa.Column("size", sa.Integer, nullable=False),
        sa.Column("taken", sa.Integer, nullable=False),
        sa.Column("offered_at", sa.Float, nullable=False),
    )

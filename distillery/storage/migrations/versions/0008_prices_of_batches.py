"""Keep the prices of batches, and when their answers were booked."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    op.add_column("teacher_batches", sa.Column("prices", sa.JSON(none_as_null=True)))
    op.add_column("teacher_batches", sa.Column("booked_at", sa.DateTime(timezone=True)))

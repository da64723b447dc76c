"""Keep rejected answers with their reason, and for every answer what was asked and what it cost."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    with op.batch_alter_table("teacher_answers") as table:
        table.alter_column("answer", existing_type=sa.String(1), nullable=True)
        table.add_column(sa.Column("reason", sa.Text, nullable=False, server_default=""))
        table.add_column(sa.Column("cached_tokens", sa.Integer, nullable=False, server_default="0"))
        table.add_column(sa.Column("cost", sa.Float))
        table.add_column(sa.Column("example_id", sa.Text, nullable=False, server_default=""))
        table.add_column(sa.Column("prompt", sa.Text, nullable=False, server_default=""))

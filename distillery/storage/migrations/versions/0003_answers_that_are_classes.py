"""Let an answer be a class's name: PostgreSQL refused more than a letter."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    with op.batch_alter_table("teacher_answers") as table:
        table.alter_column(
            "answer", existing_type=sa.String(1), type_=sa.Text, existing_nullable=True
        )

"""Keep what the teacher says of each token of a written answer."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.add_column("teacher_answers", sa.Column("tokens", sa.LargeBinary))

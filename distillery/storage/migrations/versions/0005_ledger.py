"""Keep every call that may be billed. Of those before, only the stored answers are known."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.create_table(
        "teacher_calls",
        sa.Column("call_id", sa.String(64), primary_key=True),
        sa.Column("called_at", sa.DateTime(timezone=True), nullable=False, index=True),
        sa.Column("run", sa.Text, nullable=False, index=True),
        sa.Column("recipe", sa.Text, nullable=False),
        sa.Column("teacher", sa.Text, nullable=False),
        sa.Column("purpose", sa.Text, nullable=False),
        sa.Column("outcome", sa.Text, nullable=False),
        sa.Column("request_key", sa.String(64), nullable=False),
        sa.Column("prompt_tokens", sa.Integer, nullable=False),
        sa.Column("cached_tokens", sa.Integer, nullable=False),
        sa.Column("completion_tokens", sa.Integer, nullable=False),
        sa.Column("is_counted", sa.Boolean, nullable=False),
        sa.Column("cost", sa.Float),
        sa.Column("prices", sa.JSON(none_as_null=True)),
        sa.Column("batch_id", sa.Text, nullable=False),
    )
    op.execute(
        """
        INSERT INTO teacher_calls
        SELECT request_key, created_at, '', '', teacher, 'label',
            CASE WHEN answer IS NULL THEN 'rejected' ELSE 'answer' END, request_key,
            prompt_tokens, cached_tokens, completion_tokens, true, cost, NULL, ''
        FROM teacher_answers
        """
    )

"""Give each database an id, by which those at one address are told apart."""

from uuid import uuid4

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    identity = op.create_table(
        "database_identity", sa.Column("identity", sa.String(32), primary_key=True)
    )
    op.bulk_insert(identity, [{"identity": uuid4().hex}])

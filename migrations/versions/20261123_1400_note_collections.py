"""Note when what nobody needs was last collected.

Revision: 0004
Replaces: 0003
Written: 2026-11-23 14:00:00.000000
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "collections",
        sa.Column("id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("token", sa.String(length=32), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("id = 1", name=op.f("ck_collections_alone")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_collections")),
    )


def downgrade() -> None:
    op.drop_table("collections")

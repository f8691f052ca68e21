"""Claim models, so that any worker may probe one and no two probe the same.

Revision: 0006
Replaces: 0005
Written: 2026-11-30 15:40:00.000000
"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("models", sa.Column("found_at", sa.DateTime(timezone=True)))
    op.add_column("models", sa.Column("claimed_by", sa.String(32)))
    op.add_column("models", sa.Column("claimed_until", sa.DateTime(timezone=True)))


def downgrade() -> None:
    with op.batch_alter_table("models") as models:
        models.drop_column("claimed_until")
        models.drop_column("claimed_by")
        models.drop_column("found_at")

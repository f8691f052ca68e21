"""Index waiting jobs by their team's turn, and by how long they wait.

Revision: 0008
Replaces: 0007
Written: 2026-11-30 15:50:00.000000
"""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

QUEUED = sa.text("status = 'queued'")


def upgrade() -> None:
    op.create_index(
        "ix_jobs_turns",
        "jobs",
        ["queue", "team", sa.text("priority DESC"), "created_at", "id"],
        postgresql_where=QUEUED,
        sqlite_where=QUEUED,
    )
    op.create_index(
        "ix_jobs_waits",
        "jobs",
        ["queue", "queued_at"],
        postgresql_where=QUEUED,
        sqlite_where=QUEUED,
    )
    op.drop_index("ix_jobs_queued", table_name="jobs")


def downgrade() -> None:
    op.create_index(
        "ix_jobs_queued",
        "jobs",
        ["queue", "priority", "created_at", "id"],
        postgresql_where=QUEUED,
        sqlite_where=QUEUED,
    )
    op.drop_index("ix_jobs_waits", table_name="jobs")
    op.drop_index("ix_jobs_turns", table_name="jobs")

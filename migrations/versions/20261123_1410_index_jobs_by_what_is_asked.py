"""Index jobs by what is asked of a million of them.

Revision: 0005
Replaces: 0004
Written: 2026-11-23 14:10:00.000000
"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    # What waits: as long as the queue and not as the table.
    queued = sa.text("status = 'queued'")
    op.create_index(
        "ix_jobs_queued",
        "jobs",
        ["queue", "priority", "created_at", "id"],
        postgresql_where=queued,
        sqlite_where=queued,
    )
    # A team's open jobs and lists by status; counts by queue and status.
    op.create_index(
        "ix_jobs_status_team_id", "jobs", ["status", "team", "id"], postgresql_include=["queue"]
    )
    op.drop_index("ix_jobs_queue_status_priority_created_at", table_name="jobs")


def downgrade() -> None:
    op.create_index(
        "ix_jobs_queue_status_priority_created_at",
        "jobs",
        ["queue", "status", "priority", "created_at"],
    )
    op.drop_index("ix_jobs_status_team_id", table_name="jobs")
    op.drop_index("ix_jobs_queued", table_name="jobs")

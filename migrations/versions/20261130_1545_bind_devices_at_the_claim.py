"""Bind a strategy's device at the claim, and let teams take turns on each queue.

Revision: 0007
Replaces: 0006
Written: 2026-11-30 15:45:00.000000
"""

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

JSON = sa.JSON(none_as_null=True).with_variant(postgresql.JSONB(none_as_null=True), "postgresql")


def upgrade() -> None:
    op.create_table(
        "turns",
        sa.Column("queue", sa.String(length=32), nullable=False),
        sa.Column("team", sa.String(length=64), nullable=False),
        sa.Column("last_claimed_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["team"], ["teams.name"], name=op.f("fk_turns_team_teams")),
        sa.PrimaryKeyConstraint("queue", "team", name=op.f("pk_turns")),
    )
    # Null for all jobs of before, and for what an older process still inserts: one device.
    op.add_column("jobs", sa.Column("device_options", JSON, nullable=True))


def downgrade() -> None:
    # No code of before claims from the queue of a strategy: its jobs get a device now.
    _settle_waiting_jobs()
    op.drop_column("jobs", "device_options")
    op.drop_table("turns")


def _settle_waiting_jobs() -> None:
    connection = op.get_bind()
    jobs = sa.table(
        "jobs",
        sa.column("id"),
        sa.column("queue"),
        sa.column("device"),
        sa.column("device_reason"),
        sa.column("training", JSON),
        sa.column("device_options", JSON),
    )
    workers = sa.table("workers", sa.column("queues", JSON))
    lists = connection.execute(sa.select(workers.c.queues)).scalars()
    served = {queue for queues in lists for queue in queues}
    waiting = sa.select(jobs).where(jobs.c.queue.like("auto:%"))
    for row in connection.execute(waiting).all():
        choices = _choices(row)
        # The first that a worker of the last day serves: on another they would wait for ever.
        # Without one, the last, which more machines have.
        device = next((each for each in choices if each in served), list(choices)[-1])
        choice = choices[device]
        connection.execute(
            sa
            .update(jobs)
            .where(jobs.c.id == row.id)
            .values(
                queue=device,
                device=device,
                device_reason=choice["reason"],
                training={**row.training, **choice["training"]},
            )
        )


def _choices(row: Any) -> dict[str, Any]:
    """Return a job's choices, in the order that its queue says: JSONB keeps none of its own."""
    order = row.queue.removeprefix("auto:").split(",")
    return {device: row.device_options["choices"][device] for device in order}

"""Compress adapters, and measure retention.

Revision: 0002
Replaces: 0001
Written: 2026-11-23 05:10:14.507312
"""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

ID = sa.String(length=32)
# What goes with a job, said here because SQLite's own cascades rest during a migration.
BELONGINGS = (
    *("attempts", "checkpoints", "events", "idempotency_keys"),
    *("layer_statistics", "metrics"),
)


def upgrade() -> None:
    with op.batch_alter_table("adapters", schema=None) as batch_op:
        batch_op.drop_constraint(batch_op.f("ck_adapters_origin"), type_="check")
        batch_op.create_check_constraint(
            batch_op.f("ck_adapters_origin"),
            "origin IN ('job', 'import', 'merge', 'compression')",
        )
        batch_op.add_column(sa.Column("parent_id", ID, nullable=True))
        batch_op.create_foreign_key(
            batch_op.f("fk_adapters_parent_id_adapters"),
            "adapters",
            ["parent_id"],
            ["id"],
            ondelete="SET NULL",
        )
        batch_op.create_index(batch_op.f("ix_adapters_parent_id"), ["parent_id"], unique=False)
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.add_column(
            sa.Column("kind", sa.String(length=16), server_default="training", nullable=False)
        )
        batch_op.create_check_constraint(
            batch_op.f("ck_jobs_kind"), "kind IN ('training', 'compression')"
        )
        batch_op.add_column(sa.Column("retention_dataset_id", ID, nullable=True))
        batch_op.create_foreign_key(
            batch_op.f("fk_jobs_retention_dataset_id_datasets"),
            "datasets",
            ["retention_dataset_id"],
            ["id"],
        )
        batch_op.create_index(
            batch_op.f("ix_jobs_retention_dataset_id"), ["retention_dataset_id"], unique=False
        )
        batch_op.add_column(sa.Column("source_adapter_id", ID, nullable=True))
        batch_op.create_foreign_key(
            batch_op.f("fk_jobs_source_adapter_id_adapters"),
            "adapters",
            ["source_adapter_id"],
            ["id"],
            ondelete="SET NULL",
        )
        batch_op.create_index(
            batch_op.f("ix_jobs_source_adapter_id"), ["source_adapter_id"], unique=False
        )


def downgrade() -> None:
    # The older code would train what is to be compressed. What compressions made stays, as any
    # job's adapter.
    compressions = "(SELECT id FROM jobs WHERE kind = 'compression')"
    for table in BELONGINGS:
        op.execute(f"DELETE FROM {table} WHERE job_id IN {compressions}")  # noqa: S608 - our own names
    op.execute(f"UPDATE adapters SET job_id = NULL WHERE job_id IN {compressions}")  # noqa: S608 - as above
    op.execute("DELETE FROM jobs WHERE kind = 'compression'")
    op.execute("UPDATE adapters SET origin = 'job' WHERE origin = 'compression'")
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.drop_constraint(batch_op.f("ck_jobs_kind"), type_="check")
        for column, table in (
            ("source_adapter_id", "adapters"),
            ("retention_dataset_id", "datasets"),
        ):
            batch_op.drop_index(batch_op.f(f"ix_jobs_{column}"))
            batch_op.drop_constraint(batch_op.f(f"fk_jobs_{column}_{table}"), type_="foreignkey")
            batch_op.drop_column(column)
        batch_op.drop_column("kind")
    with op.batch_alter_table("adapters", schema=None) as batch_op:
        batch_op.drop_constraint(batch_op.f("ck_adapters_origin"), type_="check")
        batch_op.drop_index(batch_op.f("ix_adapters_parent_id"))
        batch_op.drop_constraint(batch_op.f("fk_adapters_parent_id_adapters"), type_="foreignkey")
        batch_op.drop_column("parent_id")
        batch_op.create_check_constraint(
            batch_op.f("ck_adapters_origin"), "origin IN ('job', 'import', 'merge')"
        )

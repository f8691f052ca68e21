"""Limit teams' rates, and keep an audit.

Revision: 0003
Replaces: 0002
Written: 2026-11-23 13:00:00.000000
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

RATES = ("requests_per_minute", "submissions_per_minute")
WORDS = "the audit is append-only"
# Pruned rows are below the anchor, which is moved first: nothing else is ever deleted.
PRUNED = "OLD.sequence <= (SELECT anchor_sequence FROM audit_chain)"

SQLITE_TRIGGERS = (
    (
        f"CREATE TRIGGER audit_is_not_changed BEFORE UPDATE ON audit"
        f" BEGIN SELECT RAISE(ABORT, '{WORDS}'); END"
    ),
    (
        f"CREATE TRIGGER audit_is_not_removed BEFORE DELETE ON audit"
        f" WHEN NOT COALESCE({PRUNED}, 0) BEGIN SELECT RAISE(ABORT, '{WORDS}'); END"
    ),
)
POSTGRESQL_TRIGGERS = (
    f"""
    CREATE FUNCTION audit_refuse() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF TG_OP = 'DELETE' THEN
            IF {PRUNED} THEN
                RETURN OLD;
            END IF;
        END IF;
        RAISE EXCEPTION '{WORDS}' USING ERRCODE = 'restrict_violation';
    END $$
    """,
    (
        "CREATE TRIGGER audit_is_not_changed BEFORE UPDATE OR DELETE ON audit"
        " FOR EACH ROW EXECUTE FUNCTION audit_refuse()"
    ),
    (
        "CREATE TRIGGER audit_is_not_emptied BEFORE TRUNCATE ON audit"
        " FOR EACH STATEMENT EXECUTE FUNCTION audit_refuse()"
    ),
)


def upgrade() -> None:
    for name in RATES:
        op.add_column("teams", sa.Column(name, sa.BigInteger(), nullable=True))
    op.add_column("api_keys", sa.Column("replaced_by", sa.String(length=32), nullable=True))
    op.create_index(
        op.f("ix_idempotency_keys_created_at"), "idempotency_keys", ["created_at"], unique=False
    )
    op.create_table(
        "audit",
        sa.Column("sequence", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("id", sa.String(length=32), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("team", sa.String(length=64), nullable=True),
        sa.Column("key_id", sa.String(length=32), nullable=True),
        sa.Column("action", sa.Text(), nullable=False),
        sa.Column("object_id", sa.Text(), nullable=True),
        sa.Column("status", sa.BigInteger(), nullable=False),
        sa.Column("request_id", sa.Text(), nullable=True),
        sa.Column("client_address", sa.Text(), nullable=True),
        sa.Column("previous_sha256", sa.String(length=64), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.PrimaryKeyConstraint("sequence", name=op.f("pk_audit")),
        sa.UniqueConstraint("id", name=op.f("uq_audit_id")),
    )
    op.create_index(op.f("ix_audit_team_sequence"), "audit", ["team", "sequence"], unique=False)
    op.create_index(op.f("ix_audit_at"), "audit", ["at"], unique=False)
    op.create_table(
        "audit_chain",
        sa.Column("id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("head_sequence", sa.BigInteger(), nullable=False),
        sa.Column("head_sha256", sa.String(length=64), nullable=False),
        sa.Column("anchor_sequence", sa.BigInteger(), nullable=False),
        sa.Column("anchor_sha256", sa.String(length=64), nullable=False),
        sa.Column("pruned_at", sa.DateTime(timezone=True), nullable=True),
        sa.CheckConstraint("id = 1", name=op.f("ck_audit_chain_alone")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit_chain")),
    )
    is_sqlite = op.get_bind().dialect.name == "sqlite"
    for statement in SQLITE_TRIGGERS if is_sqlite else POSTGRESQL_TRIGGERS:
        op.execute(statement)


def downgrade() -> None:
    # Triggers go with their table.
    op.drop_table("audit")
    op.drop_table("audit_chain")
    if op.get_bind().dialect.name != "sqlite":
        op.execute("DROP FUNCTION audit_refuse()")
    op.drop_index(op.f("ix_idempotency_keys_created_at"), table_name="idempotency_keys")
    op.drop_column("api_keys", "replaced_by")
    for name in reversed(RATES):
        op.drop_column("teams", name)

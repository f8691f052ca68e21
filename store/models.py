"""The tables. Relationships are plain ids: nothing here loads a row behind the caller's back."""

from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, ClassVar

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    MetaData,
    String,
    Text,
    TypeDecorator,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from store.database_time import database_now

NAMING_CONVENTION = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}

Json = JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")
JsonObject = dict[str, Any]


class UtcDateTime(TypeDecorator[datetime]):
    """An aware UTC timestamp on every database; a naive one is refused."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Turn an aware timestamp into what the database keeps.

        Raises:
            ValueError: If the timestamp is naive.
        """
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"timestamp {value!r} has no time zone")
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002 - the signature is SQLAlchemy's
        """Return the stored timestamp as aware UTC."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def one_of(column: str, values: type[StrEnum]) -> CheckConstraint:
    """Return the check that keeps a text column among an enum's wire strings."""
    listed = ", ".join(f"'{value}'" for value in values)
    return CheckConstraint(f"{column} IN ({listed})", name=column)


class JobStatus(StrEnum):
    """Where a job stands; the moves between are in `store.lifecycle`."""

    CREATED = "created"
    QUEUED = "queued"
    RUNNING = "running"
    PAUSING = "pausing"
    PAUSED = "paused"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


class JobKind(StrEnum):
    """What a job makes an adapter from."""

    TRAINING = "training"
    """From a base model and a dataset."""
    COMPRESSION = "compression"
    """From another adapter, by cutting its weakest directions."""


class AttemptOutcome(StrEnum):
    """How an execution of a job went."""

    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    LOST = "lost"
    HANDED_BACK = "handed_back"
    PAUSED = "paused"
    CANCELLED = "cancelled"


class DatasetStatus(StrEnum):
    """Whether a dataset may be trained on."""

    VALIDATING = "validating"
    READY = "ready"
    REJECTED = "rejected"


class ModelStatus(StrEnum):
    """Whether a base model's layers are known."""

    REGISTERING = "registering"
    READY = "ready"
    FAILED = "failed"


class AdapterOrigin(StrEnum):
    """Where an adapter came from."""

    JOB = "job"
    IMPORT = "import"
    MERGE = "merge"
    COMPRESSION = "compression"


class Base(DeclarativeBase):
    """Root of the mapped classes."""

    metadata = MetaData(naming_convention=NAMING_CONVENTION)
    type_annotation_map: ClassVar[dict[Any, Any]] = {
        datetime: UtcDateTime(),
        JsonObject: Json,
        list[str]: Json,
        list[JsonObject]: Json,
        str: Text(),
        int: BigInteger(),
    }


class Team(Base):
    """Who owns rows. The name is what other rows refer to."""

    __tablename__ = "teams"

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    max_open_jobs: Mapped[int | None]
    max_running_jobs: Mapped[int | None]
    max_stored_bytes: Mapped[int | None]
    requests_per_minute: Mapped[int | None]
    submissions_per_minute: Mapped[int | None]
    # Only workers of before `turns` write it; the column stays while such may still run.
    last_claimed_at: Mapped[datetime | None]
    created_at: Mapped[datetime] = mapped_column(default=database_now())


class Turn(Base):
    """When a team was last given its turn on the queue of a device."""

    __tablename__ = "turns"

    queue: Mapped[str] = mapped_column(String(32), primary_key=True)
    team: Mapped[str] = mapped_column(ForeignKey("teams.name"), primary_key=True)
    last_claimed_at: Mapped[datetime] = mapped_column(default=database_now())


class ApiKey(Base):
    """A caller's key: the hash of its secret, never the secret."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    team: Mapped[str] = mapped_column(ForeignKey("teams.name"), index=True)
    name: Mapped[str]
    prefix: Mapped[str] = mapped_column(String(16), unique=True)
    secret_sha256: Mapped[str] = mapped_column(String(64))
    scopes: Mapped[list[str]]
    created_at: Mapped[datetime] = mapped_column(default=database_now())
    expires_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    # The key that came in its place; set once.
    replaced_by: Mapped[str | None] = mapped_column(String(32))


class BaseModelRow(Base):
    """A base model that this deployment may train: what users write, and where it comes from."""

    __tablename__ = "models"
    __table_args__ = (one_of("status", ModelStatus),)

    id: Mapped[str] = mapped_column(primary_key=True)
    source: Mapped[str]
    status: Mapped[str] = mapped_column(String(16), default=ModelStatus.REGISTERING)
    inventory: Mapped[JsonObject | None]
    inventory_hash: Mapped[str | None]
    failure: Mapped[JsonObject | None]
    created_at: Mapped[datetime] = mapped_column(default=database_now())
    requested_at: Mapped[datetime] = mapped_column(default=database_now())
    found_at: Mapped[datetime | None]
    """When the hub confirmed that it has the model; a folder needs no confirmation."""
    claimed_by: Mapped[str | None] = mapped_column(String(32))
    """The worker that looks the model up or probes it, until `claimed_until`."""
    claimed_until: Mapped[datetime | None]
    ready_at: Mapped[datetime | None]


class Dataset(Base):
    """An uploaded dataset: one JSONL object, named by its hash."""

    __tablename__ = "datasets"
    __table_args__ = (one_of("status", DatasetStatus), Index(None, "team", "id"))

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    team: Mapped[str] = mapped_column(ForeignKey("teams.name"))
    name: Mapped[str | None]
    status: Mapped[str] = mapped_column(String(16), default=DatasetStatus.VALIDATING)
    object_key: Mapped[str | None] = mapped_column(index=True)
    sha256: Mapped[str | None] = mapped_column(String(64))
    size_bytes: Mapped[int | None]
    num_rows: Mapped[int | None]
    num_bad_rows: Mapped[int | None]
    num_images: Mapped[int | None]
    details: Mapped[JsonObject | None]
    report: Mapped[list[JsonObject] | None]
    created_at: Mapped[datetime] = mapped_column(default=database_now())


class Job(Base):
    """A request to make an adapter, and where it stands. The queued row is the queue."""

    __tablename__ = "jobs"
    __table_args__ = (
        one_of("status", JobStatus),
        one_of("kind", JobKind),
        CheckConstraint("attempt >= 0 AND charged_attempts >= 0", name="attempts"),
        Index(None, "team", "id"),
        # What waits, by how long: as long as the queue and not as the table.
        Index(
            "ix_jobs_waits",
            "queue",
            "queued_at",
            postgresql_where=text("status = 'queued'"),
            sqlite_where=text("status = 'queued'"),
        ),
        Index(None, "status", "team", "id", postgresql_include=["queue"]),
        Index(None, "status", "lease_expires_at"),
    )

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    team: Mapped[str] = mapped_column(ForeignKey("teams.name"))
    status: Mapped[str] = mapped_column(String(16))
    phase: Mapped[str | None] = mapped_column(String(32))
    status_reason: Mapped[str | None]

    # what was asked for, frozen
    kind: Mapped[str] = mapped_column(
        String(16), default=JobKind.TRAINING, server_default=JobKind.TRAINING.value
    )
    name: Mapped[str | None]
    user_metadata: Mapped[JsonObject] = mapped_column("metadata", default=dict)
    model: Mapped[str] = mapped_column(ForeignKey("models.id"))
    dataset_id: Mapped[str] = mapped_column(ForeignKey("datasets.id"), index=True)
    eval_dataset_id: Mapped[str | None] = mapped_column(ForeignKey("datasets.id"), index=True)
    retention_dataset_id: Mapped[str | None] = mapped_column(ForeignKey("datasets.id"), index=True)
    # An open job keeps its source (`store.adapters.delete_adapter`); an ended one lets it go. The
    # two tables refer to each other, hence `use_alter`.
    source_adapter_id: Mapped[str | None] = mapped_column(
        ForeignKey(
            "adapters.id",
            name="fk_jobs_source_adapter_id_adapters",
            ondelete="SET NULL",
            use_alter=True,
        ),
        index=True,
    )
    preset: Mapped[str | None]
    request: Mapped[JsonObject]
    config: Mapped[JsonObject]
    training: Mapped[JsonObject]
    plan: Mapped[JsonObject]
    plan_hash: Mapped[str]
    # A strategy until a worker claims the job, and the device from then on.
    device: Mapped[str] = mapped_column(String(16))
    device_reason: Mapped[str | None]
    # What a job that named a strategy may be bound to: `store.device_binding`. None: one device.
    device_options: Mapped[JsonObject | None]
    queue: Mapped[str] = mapped_column(String(32))
    priority: Mapped[int] = mapped_column(default=0)

    # attempts; `attempt` is the fencing token and only grows
    attempt: Mapped[int] = mapped_column(default=0)
    charged_attempts: Mapped[int] = mapped_column(default=0)
    max_attempts: Mapped[int] = mapped_column(default=3)
    infra_failures: Mapped[int] = mapped_column(default=0)
    worker_id: Mapped[str | None] = mapped_column(String(64))
    lease_expires_at: Mapped[datetime | None]
    not_before: Mapped[datetime | None]
    last_rung_at: Mapped[datetime | None]

    # what came of it
    progress: Mapped[JsonObject | None]
    result: Mapped[JsonObject | None]
    error: Mapped[JsonObject | None]
    last_sequence: Mapped[int] = mapped_column(default=0)
    version: Mapped[int] = mapped_column(default=1)

    created_at: Mapped[datetime] = mapped_column(default=database_now())
    queued_at: Mapped[datetime | None]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    updated_at: Mapped[datetime] = mapped_column(default=database_now())


# Each team's waiting jobs in their order.
Index(
    "ix_jobs_turns",
    Job.queue,
    Job.team,
    Job.priority.desc(),
    Job.created_at,
    Job.id,
    postgresql_where=text("status = 'queued'"),
    sqlite_where=text("status = 'queued'"),
)


class IdempotencyKey(Base):
    """A key that a caller used, and the job that came of it."""

    __tablename__ = "idempotency_keys"

    team: Mapped[str] = mapped_column(ForeignKey("teams.name"), primary_key=True)
    route: Mapped[str] = mapped_column(String(64), primary_key=True)
    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    request_hash: Mapped[str]
    # Deferred: the key is written before the job, so that only its winner writes a job at all.
    job_id: Mapped[str] = mapped_column(
        ForeignKey("jobs.id", ondelete="CASCADE", deferrable=True, initially="DEFERRED"), index=True
    )
    created_at: Mapped[datetime] = mapped_column(default=database_now(), index=True)


class Attempt(Base):
    """One execution of a job by one worker."""

    __tablename__ = "attempts"
    __table_args__ = (one_of("outcome", AttemptOutcome), UniqueConstraint("job_id", "number"))

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    number: Mapped[int]
    worker_id: Mapped[str] = mapped_column(String(64))
    outcome: Mapped[str] = mapped_column(String(16), default=AttemptOutcome.RUNNING)
    failure: Mapped[JsonObject | None]
    resumed_from_step: Mapped[int | None]
    last_step: Mapped[int | None]
    started_at: Mapped[datetime] = mapped_column(default=database_now())
    ended_at: Mapped[datetime | None]


class Event(Base):
    """An immutable numbered fact about a job; the numbers have no gap."""

    __tablename__ = "events"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    sequence: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    type: Mapped[str] = mapped_column(String(64))
    payload: Mapped[JsonObject]
    attempt: Mapped[int | None]
    created_at: Mapped[datetime] = mapped_column(default=database_now())


class Metric(Base):
    """The measured numbers of one step; a newer attempt replaces an older one's."""

    __tablename__ = "metrics"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    attempt: Mapped[int]
    epoch: Mapped[float | None]
    train_loss: Mapped[float | None]
    eval_loss: Mapped[float | None]
    learning_rate: Mapped[float | None]
    grad_norm: Mapped[float | None]
    num_tokens: Mapped[int | None]
    tokens_per_second: Mapped[float | None]
    elapsed_seconds: Mapped[float | None]
    modalities: Mapped[JsonObject | None]
    created_at: Mapped[datetime] = mapped_column(default=database_now())


class LayerStatistics(Base):
    """The curvature of every layer at one step."""

    __tablename__ = "layer_statistics"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    attempt: Mapped[int]
    layers: Mapped[JsonObject]
    created_at: Mapped[datetime] = mapped_column(default=database_now())


class Checkpoint(Base):
    """A stored point that a job can resume from; its objects are complete."""

    __tablename__ = "checkpoints"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    attempt: Mapped[int]
    prefix: Mapped[str]
    manifest_sha256: Mapped[str | None] = mapped_column(String(64))
    size_bytes: Mapped[int | None]
    created_at: Mapped[datetime] = mapped_column(default=database_now())


class Adapter(Base):
    """A trained, compressed, imported or merged adapter; its objects are complete."""

    __tablename__ = "adapters"
    __table_args__ = (one_of("origin", AdapterOrigin), Index(None, "team", "id"))

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    team: Mapped[str] = mapped_column(ForeignKey("teams.name"))
    # One adapter a job, and the database settles it.
    job_id: Mapped[str | None] = mapped_column(
        ForeignKey("jobs.id", ondelete="SET NULL"), unique=True
    )
    origin: Mapped[str] = mapped_column(String(16), default=AdapterOrigin.JOB)
    # What it was cut from, as long as that is there.
    parent_id: Mapped[str | None] = mapped_column(
        ForeignKey("adapters.id", ondelete="SET NULL"), index=True
    )
    name: Mapped[str | None]
    model: Mapped[str] = mapped_column(ForeignKey("models.id"))
    prefix: Mapped[str]
    sha256: Mapped[str | None] = mapped_column(String(64))
    size_bytes: Mapped[int | None]
    trainable_parameters: Mapped[int | None]
    details: Mapped[JsonObject | None]
    created_at: Mapped[datetime] = mapped_column(default=database_now())


class Worker(Base):
    """A live process that serves queues."""

    __tablename__ = "workers"

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    hostname: Mapped[str]
    process_id: Mapped[int]
    queues: Mapped[list[str]]
    device: Mapped[str] = mapped_column(String(16))
    details: Mapped[JsonObject | None]
    stopping: Mapped[bool] = mapped_column(default=False)
    started_at: Mapped[datetime] = mapped_column(default=database_now())
    seen_at: Mapped[datetime] = mapped_column(default=database_now())


class AuditRow(Base):
    """Who asked for a change, and what came of it. Rows are only ever appended, chained by hash."""

    __tablename__ = "audit"
    __table_args__ = (Index(None, "team", "sequence"),)

    sequence: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    # No reference to teams or keys: the audit outlives both.
    id: Mapped[str] = mapped_column(String(32), unique=True)
    at: Mapped[datetime] = mapped_column(index=True)
    team: Mapped[str | None] = mapped_column(String(64))
    key_id: Mapped[str | None] = mapped_column(String(32))
    action: Mapped[str]
    object_id: Mapped[str | None]
    status: Mapped[int]
    request_id: Mapped[str | None]
    client_address: Mapped[str | None]
    previous_sha256: Mapped[str] = mapped_column(String(64))
    sha256: Mapped[str] = mapped_column(String(64))


class AuditChain(Base):
    """Both ends of the audit's chain: its last row, and what was pruned before its first."""

    __tablename__ = "audit_chain"
    __table_args__ = (CheckConstraint("id = 1", name="alone"),)

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    head_sequence: Mapped[int]
    head_sha256: Mapped[str] = mapped_column(String(64))
    anchor_sequence: Mapped[int]
    anchor_sha256: Mapped[str] = mapped_column(String(64))
    pruned_at: Mapped[datetime | None]


class Collection(Base):
    """The last collection of what nobody needs; its token is also in the object store."""

    __tablename__ = "collections"
    __table_args__ = (CheckConstraint("id = 1", name="alone"),)

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    token: Mapped[str] = mapped_column(String(32))
    started_at: Mapped[datetime] = mapped_column(default=database_now())
    finished_at: Mapped[datetime | None]

"""How this deployment is wired: one class, read from `GRIT_*` variables and nothing else."""

from pathlib import Path
from typing import Annotated, Self
from urllib.parse import quote, urlsplit, urlunsplit

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SecretsSettingsSource,
    SettingsConfigDict,
)

from store.redaction import password_of

PositiveSeconds = Annotated[float, Field(gt=0)]
PositiveInt = Annotated[int, Field(gt=0)]
NotNegativeInt = Annotated[int, Field(ge=0)]
# Shown by no `repr`: it may hold a password.
SecretUrl = Annotated[str, Field(repr=False)]

SECRETS_FOLDER = Path("/run/secrets")
"""Where containers find their secrets: a file `grit_<setting>` stands for `GRIT_<SETTING>`."""


class Settings(BaseSettings):
    """Where rows, objects and messages live, and the bounds that this deployment keeps."""

    model_config = SettingsConfigDict(
        env_prefix="GRIT_",
        extra="ignore",
        frozen=True,
        use_attribute_docstrings=True,
        # A refusal shows what was refused, and that may be a password.
        hide_input_in_errors=True,
    )

    home: Path = Path(".grit")
    """Folder of the embedded mode: database, objects, logs, key and scratch space."""

    # --- where things are
    database_url: SecretUrl = ""
    """SQLAlchemy URL. Empty: `sqlite:///<home>/grit.db`. PostgreSQL: `postgresql+psycopg://...`."""
    database_password: SecretStr | None = None
    """Password of `database_url`, in place of one in the URL itself."""
    objects_url: str = ""
    """`file:///folder` or `s3://bucket/prefix`. Empty: the folder `<home>/objects`."""
    s3_endpoint: str | None = None
    """URL of an S3 server that is not Amazon's; plain http is accepted for it."""
    s3_region: str = "us-east-1"
    """Region of the bucket."""
    s3_access_key_id: str | None = None
    """Access key; none: the standard credential chain of the cloud's environment."""
    s3_secret_access_key: SecretStr | None = None
    """Secret of the access key."""
    objects_retry_seconds: PositiveSeconds = 60.0
    """How long a request to S3 is tried again, with growing waits, before it counts as failed."""
    objects_silence_seconds: PositiveSeconds = 30.0
    """How long S3 may send nothing before the connection is given up and the request made again."""
    broker_url: SecretUrl = "redis://127.0.0.1:6379/0"
    """Redis or Valkey: the doorbell and the inference mailbox."""
    broker_password: SecretStr | None = None
    """Password of `broker_url`, in place of one in the URL itself."""
    queue_prefix: str = "grit:"
    """Prefix of every key in the broker, so that several deployments can share one."""
    key_file: Path | None = None
    """Embedded mode: the API writes its generated key here at its first start."""
    allowed_models: list[str] = []
    """Globs over hub ids (`org/name`) and over absolute folders that jobs may name as `model`."""

    allowed_hosts: list[str] = []
    """Globs of the Host names that the API answers to (without ports). Empty: any."""

    # --- rows
    pool_size: PositiveInt = 10
    """Connections kept per process (PostgreSQL)."""
    pool_timeout_seconds: PositiveSeconds = 2.0
    """Longest wait for a free connection before the answer is "unavailable"."""
    statement_timeout_seconds: PositiveSeconds = 10.0
    """Longest statement (PostgreSQL)."""
    lock_timeout_seconds: PositiveSeconds = 2.0
    """Longest wait for a row lock (PostgreSQL)."""
    busy_timeout_seconds: PositiveSeconds = 10.0
    """Longest wait for the writer's turn (SQLite)."""

    # --- attempts
    heartbeat_seconds: PositiveSeconds = 10.0
    """A worker extends its lease this often."""
    lease_seconds: PositiveSeconds = 60.0
    """Without a heartbeat for so long, an attempt is lost and another worker gets the job."""
    reaper_seconds: PositiveSeconds = 5.0
    """How often every worker looks for expired leases and for rows whose bell was lost."""
    ring_again_seconds: PositiveSeconds = 30.0
    """A queued row's bell is repeated at most this often."""
    stall_seconds: PositiveSeconds = 1800.0
    """Without a new step (or, in a compression, new rows) for so long, an attempt is retried."""
    training_threads: PositiveInt | None = None
    """CPU threads of the training process; none: torch's own choice, as on the command line."""
    dataset_cache_bytes: PositiveInt = 20 * 1024**3
    """Datasets that a worker keeps between attempts, the least recently used deleted first."""
    stop_grace_seconds: PositiveSeconds = 60.0
    """Time an attempt has to save a checkpoint and stop before it is killed."""
    max_attempts: PositiveInt = 3
    """Executions of a job before a retryable failure becomes final. Counted at the claim."""
    max_infra_failures: PositiveInt = 20
    """Hand-backs that are not the job's fault before it fails all the same."""
    backoff_first_seconds: PositiveSeconds = 10.0
    """Wait before the second attempt; doubled for every further one."""
    backoff_cap_seconds: PositiveSeconds = 360.0
    """Longest wait between attempts."""
    worker_seen_seconds: PositiveSeconds = 30.0
    """A worker silent for longer does not count as live."""

    # --- collection
    collect_seconds: PositiveSeconds = 3600.0
    """How often one of the workers deletes what nobody needs any more."""
    collect_after_seconds: PositiveSeconds = 86_400.0
    """Objects that no row refers to are kept for so long, and all after a restore of the rows."""
    keep_checkpoints_seconds: PositiveSeconds = 604_800.0
    """How long an ended job keeps its checkpoints; without them a retry begins at step 0."""
    keep_idempotency_keys_seconds: PositiveSeconds = 259_200.0
    """How long the answer to an idempotency key is remembered."""

    # --- admission
    max_body_bytes: PositiveInt = 32 * 1024**2
    """Largest JSON body."""
    slow_body_seconds: PositiveSeconds = 10.0
    """As long as this a body may come with less than 1 KiB a second."""
    max_upload_bytes: PositiveInt = 8 * 1024**3
    """Largest dataset upload."""
    intake_processes: PositiveInt = 4
    """Uploads that are judged at a time; each has a process of its own."""
    intake_memory_bytes: Annotated[int, Field(ge=512 * 1024**2)] = 2 * 1024**3
    """Address space of each of these processes."""
    intake_seconds: PositiveSeconds = 60.0
    """Processor time for judging an upload, and two seconds more for each MiB of it."""
    max_open_jobs: PositiveInt = 1000
    """Jobs of one team that have not ended; a team's own row may say otherwise."""
    max_running_jobs: PositiveInt | None = None
    """Jobs of one team that run at once on a queue; none: no bound. Likewise."""
    max_stored_bytes: PositiveInt | None = None
    """Bytes of one team's datasets, adapters and checkpoints; none: no bound. Likewise."""
    rate_requests_per_minute: NotNegativeInt = 6000
    """Requests of one key in a minute; 0: no limit. A team with a rate of its own goes by that."""
    rate_submissions_per_minute: NotNegativeInt = 600
    """Of them, those that submit: a POST that needs the scope `write`. Likewise."""
    rate_team_requests_per_minute: NotNegativeInt = 12_000
    """Requests of all keys of one team in a minute; 0: no limit. Likewise."""
    rate_team_submissions_per_minute: NotNegativeInt = 1200
    """Of them, those that submit. Likewise."""

    # --- inference
    infer_timeout_seconds: PositiveSeconds = 120.0
    """Longest wait of `POST /infer` for its answer, or for the next piece of a stream."""
    infer_keep_seconds: PositiveInt = 300
    """How long an answer that nobody reads stays in the mailbox."""
    infer_resident_models: PositiveInt = 2
    """Base models that an inference worker keeps in memory."""
    infer_resident_adapters: PositiveInt = 16
    """Adapters that it keeps in memory beside each of them."""
    infer_cached_adapters: PositiveInt = 256
    """Adapters that it keeps on its disk."""
    infer_max_batch: PositiveInt = 16
    """Requests of a base model that share its steps; a worker answers a few more at a time."""
    infer_max_waiting: PositiveInt = 256
    """Requests that may wait for the workers of a device; one more is answered with 429."""
    infer_max_waiting_per_team: PositiveInt = 64
    """Requests of one team that may wait for them."""
    infer_max_rank: PositiveInt = 256
    """Adapters of a larger rank are refused."""
    infer_adapter_bytes: PositiveInt = 2 * 1024**3
    """Bound on the adapters in place beside each base model, and on the copies in main memory."""
    infer_image_cache_bytes: Annotated[int, Field(ge=0)] = 256 * 1024**2
    """Bound on the image features kept for each base model; 0 keeps none."""
    infer_prefix_cache_bytes: Annotated[int, Field(ge=0)] = 256 * 1024**2
    """Bound on the keys and values of prompts kept for each base model; 0 keeps none."""
    infer_lost_seconds: Annotated[int, Field(ge=2)] = 10
    """A worker silent for so long has lost the requests that it was answering."""
    remote_image_hosts: list[str] = []
    """Globs of the hosts that images may be fetched from. Empty: data URLs only."""
    remote_image_seconds: PositiveSeconds = 10.0
    """Longest time that fetching one image may take."""
    inventory_wait_seconds: PositiveSeconds = 50.0
    """How long `POST /jobs` waits for the probe of a model that it names first; the probe's process
    loads torch, which takes seconds, and more on a busy machine. Clients wait 60 s for a sign."""

    @model_validator(mode="after")
    def _derive_from_home(self) -> Self:
        """Fill the URLs that follow from `home`, and make every path absolute.

        Raises:
            ValueError: If a lease would end before its first heartbeat.
        """
        home = self.home.expanduser().absolute()
        derived: dict[str, object] = {"home": home}
        if not self.database_url:
            derived["database_url"] = f"sqlite:///{home}/grit.db"
        if not self.objects_url:
            derived["objects_url"] = f"file://{home}/objects"
        for name in ("database", "broker"):
            password = getattr(self, f"{name}_password")
            if password is not None:
                url = getattr(self, f"{name}_url")
                derived[f"{name}_url"] = _with_password(url, password.get_secret_value())
        if self.key_file is not None:
            derived["key_file"] = self.key_file.expanduser().absolute()
        # The model is frozen for its readers; this is still its construction.
        self.__dict__.update(derived)
        if self.lease_seconds <= self.heartbeat_seconds:
            raise ValueError(
                f"lease_seconds ({self.lease_seconds}) must be above heartbeat_seconds"
                f" ({self.heartbeat_seconds}); three times as long is a good start"
            )
        return self

    @property
    def is_sqlite(self) -> bool:
        """Whether the rows live in SQLite, the embedded mode."""
        return self.database_url.startswith("sqlite")

    def secrets(self) -> list[str]:
        """Return what no log line and no answer may hold."""
        secret = self.s3_secret_access_key
        found = [password_of(self.database_url), password_of(self.broker_url)]
        found += [None if secret is None else secret.get_secret_value()]
        return [each for each in found if each]

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - the signature is pydantic's
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - likewise
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read arguments, then the environment, then the files of secrets if there are any."""
        if not SECRETS_FOLDER.is_dir():
            return init_settings, env_settings
        files = SecretsSettingsSource(settings_cls, secrets_dir=SECRETS_FOLDER)
        return init_settings, env_settings, files


def _with_password(url: str, password: str) -> str:
    """Return a URL with a password, which it may not have yet.

    Raises:
        ValueError: If it has one, or names no host to tell it to.
    """
    if password_of(url) is not None:
        raise ValueError("a URL and its `_password` setting both hold a password; keep one of them")
    parts = urlsplit(url)
    if not parts.netloc:
        raise ValueError("a `_password` setting is set beside a URL without a host; remove it")
    user, _, host = parts.netloc.rpartition("@")
    return urlunsplit(parts._replace(netloc=f"{user}:{quote(password, safe='')}@{host}"))

"""How this deployment is wired: one class, read from `GRIT_*` variables and nothing else."""

import re
from pathlib import Path
from typing import Annotated, Self
from urllib.parse import quote, urlsplit

from pydantic import (
    AnyHttpUrl,
    Field,
    SecretStr,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from store.configuration.faults import describe_invalid, describe_unknown, variable_name
from store.configuration.sources import GivenSource, InvalidSettings, read_given
from store.configuration.urls import add_password, normalize_broker_url, normalize_database_url
from store.redaction import password_of

# Ten years at most: what is longer is a mistake, and overflows a date.
PositiveSeconds = Annotated[float, Field(gt=0, le=315_360_000, allow_inf_nan=False)]
# PostgreSQL counts milliseconds, and takes 0 of them for no limit.
StatementSeconds = Annotated[float, Field(ge=0.01, le=86_400, allow_inf_nan=False)]
PositiveInt = Annotated[int, Field(gt=0)]
# Of a device's memory: 0 would leave none, and beyond 1 there is none.
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
NotNegativeInt = Annotated[int, Field(ge=0)]
# Shown by no `repr`: it may hold a password.
SecretUrl = Annotated[str, Field(repr=False)]

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")
SECRETS_FOLDER = Path("/run/secrets")
"""Where Docker and Kubernetes put files of secrets."""


class Settings(BaseSettings):
    """Where rows, objects and messages live, and the bounds that this deployment keeps."""

    model_config = SettingsConfigDict(
        env_prefix="GRIT_",
        extra="ignore",
        frozen=True,
        use_attribute_docstrings=True,
        # A refusal shows what was refused, and that may be a password.
        hide_input_in_errors=True,
        env_ignore_empty=True,
    )

    home: Path = Path(".grit")
    """Folder of this process on its machine: scratch space, caches, locks. In the embedded mode
    also the database, objects, logs and key. Two services need two folders."""

    # --- connections
    secrets_folder: Path = SECRETS_FOLDER
    """Folder of files of secrets: the file `grit_<setting>` stands for `GRIT_<SETTING>`. Only the
    variable counts here, and variables win over files."""
    database_url: SecretUrl = ""
    """`postgresql://user@host:5432/name` or `sqlite:///<file>`. Unset: `sqlite:///<home>/grit.db`.
    In a URL, reserved characters of a password are percent-encoded."""
    database_password: SecretStr | None = None
    """Password of `database_url`, instead of one in the URL. Any characters, as they are."""
    objects_url: SecretUrl = ""
    """`file:///folder` or `s3://bucket/prefix`. Unset: the folder `<home>/objects`."""
    s3_endpoint: Annotated[str | None, Field(repr=False)] = None
    """URL of an S3 server that is not Amazon's; plain http is accepted for it."""
    s3_region: str = "us-east-1"
    """Region of the bucket."""
    s3_access_key_id: str | None = None
    """Access key. Unset: the standard credential chain of the cloud's environment."""
    s3_secret_access_key: SecretStr | None = None
    """Secret of the access key. Any characters, as they are."""
    objects_retry_seconds: PositiveSeconds = 60.0
    """How long a request to S3 is tried again, with growing waits, before it counts as failed."""
    objects_silence_seconds: PositiveSeconds = 30.0
    """How long S3 may send nothing before the connection is given up and the request made again."""
    broker_url: SecretUrl = "redis://127.0.0.1:6379/0"
    """Redis or Valkey, as `redis://host:6379/0`, or `rediss://` with TLS: the doorbell and the
    inference mailbox."""
    broker_password: SecretStr | None = None
    """Password of `broker_url`, instead of one in the URL. Any characters, as they are."""
    queue_prefix: str = "grit:"
    """Prefix of every key in the broker. Services that share a broker need different ones."""
    key_file: Path | None = None
    """Embedded mode: the API writes its generated key here at its first start."""
    allowed_models: list[str] = []
    """Globs over hub ids (`org/name`) and over absolute folders that jobs may name as `model`."""
    hub_seconds: PositiveSeconds = 0.8
    """Longest wait of a worker for the hub's answer whether it has a model."""

    allowed_hosts: list[str] = []
    """Globs of the Host names that the API answers to (without ports). Empty: any."""
    root_path: Annotated[str, Field(pattern=r"^((/[A-Za-z0-9._~-]+)+)?$")] = ""
    """Prefix under which a proxy serves the API, such as `/grit`; links in answers begin with it.
    Empty: none, or what the proxy says in `X-Forwarded-Prefix`."""

    # --- rows
    pool_size: PositiveInt = 10
    """Connections kept per process (PostgreSQL)."""
    pool_timeout_seconds: PositiveSeconds = 2.0
    """Longest wait for a free connection before the answer is "unavailable"."""
    statement_timeout_seconds: StatementSeconds = 10.0
    """Longest statement (PostgreSQL)."""
    lock_timeout_seconds: StatementSeconds = 2.0
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
    train_device_memory_share: Share | None = None
    """Share of a card's memory, above 0 and at most 1, that a training process may take; none: all
    of it. For a card that an inference worker uses too: both shares together at most 1. On the CPU
    it means nothing."""
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
    """How often one of the workers deletes what is no longer needed."""
    collect_after_seconds: PositiveSeconds = 86_400.0
    """Objects that no row refers to are kept for so long, and all after a restore of the rows."""
    keep_checkpoints_seconds: PositiveSeconds = 604_800.0
    """How long an ended job keeps its checkpoints; without them a retry begins at step 0."""
    keep_failed_models_seconds: PositiveSeconds = 86_400.0
    """How long a base model that cannot be used stays listed after it was last asked for."""
    keep_idempotency_keys_seconds: PositiveSeconds = 259_200.0
    """How long the answer to an idempotency key is remembered."""

    # --- admission
    min_free_bytes: NotNegativeInt = 256 * 1024**2
    """`/readyz` calls a disk of rows, objects or temporary files full when less is free."""
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
    """Longest wait of `POST /infer` without news: for the first token of its answer, and while it
    grows, whole or streamed."""
    infer_max_new_tokens: Annotated[int, Field(gt=0, le=1_000_000)] = 2048
    """Longest answer in tokens: the bound of a request, and where it names none, its default."""
    infer_keep_seconds: PositiveInt = 300
    """How long an unread answer stays in the mailbox."""
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
    infer_key_bytes: PositiveInt = 4 * 1024**3
    """Bound on the keys and values of the requests that share the steps of a base model; one
    request may have more."""
    infer_device_memory_share: Share | None = None
    """Share of a card's memory, above 0 and at most 1, that an inference worker may take; none: all
    of it. For a card that a training worker uses too."""
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
            ValueError: If settings contradict each other; one line for each fault.
        """
        home = self.home.expanduser().absolute()
        derived: dict[str, object] = {"home": home}
        if not self.objects_url:
            derived["objects_url"] = f"file://{quote(str(home))}/objects"
        if self.key_file is not None:
            derived["key_file"] = self.key_file.expanduser().absolute()
        faults = [*_check_objects(self), *_check_seconds(self)]
        database_url = self.database_url or f"sqlite:///{home}/grit.db"
        for name, url, password, normalize in (
            ("database_url", database_url, self.database_password, normalize_database_url),
            ("broker_url", self.broker_url, self.broker_password, normalize_broker_url),
        ):
            try:
                found = normalize(url)
                if password is not None:
                    found = add_password(found, password.get_secret_value())
                derived[name] = found
            except ValueError as error:
                faults.append(f"{variable_name(name)} cannot be used: {error}")
        if faults:
            raise ValueError("\n".join(faults))
        # The model is frozen for its readers; this is still its construction.
        self.__dict__.update(derived)
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
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - the signature is pydantic's
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - likewise
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - likewise
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read arguments, then the environment, then the files of secrets if there are any."""
        return init_settings, GivenSource(settings_cls, read_given(SECRETS_FOLDER))


def load_settings() -> Settings:
    """Return the settings of this process, from its environment and its files of secrets.

    Raises:
        InvalidSettings: If a value cannot be used or a `GRIT_*` name is unknown.
    """
    given = read_given(SECRETS_FOLDER)
    faults = describe_unknown(Settings, given)
    try:
        settings = Settings()
    except ValidationError as error:
        raise InvalidSettings([*faults, *describe_invalid(Settings, error, given)]) from None
    if faults:
        raise InvalidSettings(faults)
    return settings


def _check_objects(settings: Settings) -> list[str]:
    faults = []
    url = urlsplit(settings.objects_url)
    is_folder = url.scheme == "file" and url.netloc in {"", "localhost"} and url.path
    is_bucket = url.scheme == "s3" and _BUCKET.fullmatch(url.netloc)
    if settings.objects_url and not is_folder and not is_bucket:
        faults.append("GRIT_OBJECTS_URL must be file:///folder or s3://bucket/prefix")
    if settings.s3_endpoint is not None and not _is_endpoint(settings.s3_endpoint):
        faults.append("GRIT_S3_ENDPOINT must be http://host:port or https://host:port")
    if (settings.s3_access_key_id is None) != (settings.s3_secret_access_key is None):
        faults.append("GRIT_S3_ACCESS_KEY_ID and GRIT_S3_SECRET_ACCESS_KEY must be set together")
    return faults


def _is_endpoint(text: str) -> bool:
    try:
        url = TypeAdapter(AnyHttpUrl).validate_python(text)
    except ValidationError:
        return False
    return url.username is None and url.password is None and url.query is None


def _check_seconds(settings: Settings) -> list[str]:
    if settings.lease_seconds > settings.heartbeat_seconds:
        return []
    lease, heartbeat = settings.lease_seconds, settings.heartbeat_seconds
    fault = f"GRIT_LEASE_SECONDS is {lease:g}; it must be above GRIT_HEARTBEAT_SECONDS"
    return [f"{fault} ({heartbeat:g}), best three times as long"]

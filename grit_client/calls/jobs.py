"""Jobs: what to fine-tune, and how it goes."""

import math
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast
from uuid import uuid4

from grit_client.answers import ENDED, Event, Job
from grit_client.calls.resource import MAX_PAGE, Calls, path_of
from grit_client.errors import JobFailed, ServiceUnavailable, ServiceUnreachable
from grit_client.event_stream import parse
from grit_client.job_spec import job_body

if TYPE_CHECKING:
    from grit_core.config.model_configs import ModelGRITConfig
    from grit_core.config.training import TrainingConfig

SILENCE_SECONDS = 45.0
"""An event stream that sends not even a heartbeat for so long is taken for dead."""


LOG_PAUSE_SECONDS = 2.0
"""Between two looks at a log that has not grown."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogPart:
    """A part of an attempt's log."""

    attempt: int
    """0 where no attempt has begun."""
    state: str
    """`complete`, `running`, `partial` or `none`; see `GET /jobs/{id}/logs`."""
    text: str
    next: int
    """The offset that continues after it."""


class JobCalls(Calls):
    """Calls under `/jobs`."""

    def plan(
        self,
        spec: Mapping[str, Any],
        *,
        config: "ModelGRITConfig | None" = None,
        training: "TrainingConfig | None" = None,
    ) -> dict[str, Any]:
        """`POST /jobs/plan`: which layers a job would adapt, its parameters, memory and steps.

        Args:
            spec: The JSON of a job.
            config: The library's own configuration object, in place of `spec["config"]`.
            training: The library's own training object, in place of `spec["training"]`.
        """
        body = job_body(spec, config=config, training=training)
        answer = self._connection.json("POST", "/jobs/plan", json=body, idempotent=True)
        return cast("dict[str, Any]", answer)

    def create_job(
        self,
        spec: Mapping[str, Any],
        *,
        config: "ModelGRITConfig | None" = None,
        training: "TrainingConfig | None" = None,
        idempotency_key: str | None = None,
    ) -> Job:
        """`POST /jobs`: create a job; sent again on a broken connection without creating two.

        Args:
            spec: The JSON of a job.
            config: The library's own configuration object, in place of `spec["config"]`.
            training: The library's own training object, in place of `spec["training"]`.
            idempotency_key: Your own name for this request, so that another process can repeat it;
                by default a fresh one.
        """
        body = job_body(spec, config=config, training=training)
        headers = {"Idempotency-Key": idempotency_key or uuid4().hex}
        answer = self._connection.json("POST", "/jobs", json=body, headers=headers, idempotent=True)
        return cast("Job", answer)

    def get_job(self, job: str, *, wait: float | None = None) -> Job:
        """`GET /jobs/{id}`: the job with its live progress; with `wait`, after its next change.

        Args:
            job: The job's id.
            wait: Longest wait for a change; whole seconds, rounded up.
        """
        params = {} if wait is None else {"wait": math.ceil(wait)}
        answer = self._connection.json(
            "GET", path_of("jobs", job), params=params, silence_seconds=self._silence(wait)
        )
        return cast("Job", answer)

    def poll_job(self, job: str, *, wait: float, etag: str | None) -> tuple[Job | None, str | None]:
        """Wait until a job is another than the one with this ETag; no change is missed.

        Args:
            job: The job's id.
            wait: Longest wait; whole seconds, rounded up.
            etag: Of the state already seen; None asks for the state at once.

        Returns:
            The job, None when it is unchanged; and its ETag.
        """
        headers = {} if etag is None else {"If-None-Match": etag}
        params = {} if etag is None else {"wait": math.ceil(wait)}
        response = self._connection.request(
            "GET",
            path_of("jobs", job),
            params=params,
            headers=headers,
            silence_seconds=self._silence(wait),
        )
        if response.status_code == 304:
            return None, etag
        return cast("Job", self._connection.decoded(response)), response.headers.get("ETag")

    def list_jobs(
        self,
        *,
        status: Sequence[str] = (),
        name: str | None = None,
        model: str | None = None,
        device: str | None = None,
        created_after: str | None = None,
        created_before: str | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Iterator[Job]:
        """`GET /jobs`: every job that passes the filters, newest first, page after page."""
        params: dict[str, Any] = {
            "status": list(status) or None,
            "name": name,
            "model": model,
            "device": device,
            "created_after": created_after,
            "created_before": created_before,
            **{f"metadata[{key}]": value for key, value in (metadata or {}).items()},
        }
        return cast("Iterator[Job]", self._pages("/jobs", {**params, "limit": MAX_PAGE}))

    def cancel(self, job: str) -> Job:
        """`POST /jobs/{id}/cancel`."""
        return self._move(job, "cancel")

    def pause(self, job: str) -> Job:
        """`POST /jobs/{id}/pause`: stop at the next checkpoint, to be resumed from it."""
        return self._move(job, "pause")

    def resume(self, job: str) -> Job:
        """`POST /jobs/{id}/resume`."""
        return self._move(job, "resume")

    def retry(self, job: str) -> Job:
        """`POST /jobs/{id}/retry`: run a failed or cancelled job again."""
        return self._move(job, "retry")

    def start(self, job: str) -> Job:
        """`POST /jobs/{id}/start`: queue a job that was created with `auto_start: false`."""
        return self._move(job, "start")

    def delete_job(self, job: str) -> None:
        """`DELETE /jobs/{id}`: ended jobs only."""
        self._connection.request("DELETE", path_of("jobs", job))

    def events(self, job: str, *, after: int | None = None, limit: int = MAX_PAGE) -> list[Event]:
        """`GET /jobs/{id}/events`: one page of the event log, after a sequence number."""
        params = {"limit": limit} | ({} if after is None else {"after": after})
        page = self._connection.json("GET", path_of("jobs", job, "events"), params=params)
        return cast("list[Event]", page["data"])

    def stream_events(
        self, job: str, *, after: int | None = None, patience_seconds: float = 120.0
    ) -> Iterator[Event]:
        """Yield a job's events as they happen, until its last one; reconnects without gaps.

        Args:
            job: The job's id.
            after: Skip the events up to this sequence number.
            patience_seconds: How long the service may stay away before the error is raised.

        Raises:
            ServiceUnreachable: The service stayed away for longer.
        """
        last_id = None if after is None else str(after)
        away_since: float | None = None
        while True:
            headers = {"Accept": "text/event-stream"}
            if last_id is not None:
                headers["Last-Event-ID"] = last_id
            try:
                with self._connection.stream(
                    "GET",
                    path_of("jobs", job, "events"),
                    headers=headers,
                    silence_seconds=SILENCE_SECONDS,
                ) as response:
                    for message in parse(response.iter_lines()):
                        away_since = None
                        last_id = message.id if message.id is not None else last_id
                        if isinstance(message.data, dict):
                            yield cast("Event", message.data)
                    # 204: there was nothing left to follow.
                    if response.status_code == 204:
                        return
            except ServiceUnreachable as error:
                if isinstance(error, ServiceUnavailable) and error.problem.status == 500:
                    raise
                now = time.monotonic()
                away_since = away_since or now
                if now - away_since > patience_seconds:
                    raise
            time.sleep(0.5)

    def metrics(
        self, job: str, *, after_step: int | None = None, max_points: int | None = None
    ) -> dict[str, Any]:
        """`GET /jobs/{id}/metrics`: columns of numbers, one for each step reported."""
        return self._about(job, "metrics", after_step=after_step, max_points=max_points)

    def layers(self, job: str) -> dict[str, Any]:
        """`GET /jobs/{id}/layers`: rank, effective rank and spectrum of every adapted layer."""
        return self._about(job, "layers")

    def checkpoints(self, job: str) -> dict[str, Any]:
        """`GET /jobs/{id}/checkpoints`."""
        return self._about(job, "checkpoints")

    def logs(self, job: str, *, attempt: int | None = None, tail_bytes: int | None = None) -> str:
        """`GET /jobs/{id}/logs`: the end of what an attempt's training process wrote.

        Args:
            job: The job's id.
            attempt: Its number; by default the newest. The log of one that runs is some seconds
                behind.
            tail_bytes: At most so much of the end.
        """
        return self._log(job, attempt=attempt, tail_bytes=tail_bytes).text

    def follow_logs(
        self, job: str, *, tail_bytes: int | None = None, pause_seconds: float = LOG_PAUSE_SECONDS
    ) -> Iterator[LogPart]:
        """Yield a job's log as it grows, attempt after attempt, until the job has ended.

        Args:
            job: The job's id.
            tail_bytes: At most so much of what is there already.
            pause_seconds: Between two requests that bring nothing new.
        """
        part = self._log(job, tail_bytes=tail_bytes)
        while True:
            if part.text:
                yield part
            elif part.state == "running":
                time.sleep(pause_seconds)
            else:
                # All of this attempt is shown: the job has ended, or another attempt comes.
                state = self.get_job(job)
                if int(state.get("attempt") or 0) > part.attempt:
                    part = replace(part, attempt=part.attempt + 1, next=0)
                elif state["status"] in ENDED:
                    return
                else:
                    time.sleep(pause_seconds)
            attempt = part.attempt or None
            part = self._log(job, attempt=attempt, offset=part.next)

    def _log(self, job: str, **params: int | None) -> LogPart:
        given = {name: value for name, value in params.items() if value is not None}
        answer = self._connection.request("GET", path_of("jobs", job, "logs"), params=given)
        return LogPart(
            attempt=int(answer.headers.get("X-Log-Attempt", 0)),
            state=answer.headers.get("X-Log-State", "complete"),
            text=answer.text,
            next=int(answer.headers.get("X-Log-Next", 0)),
        )

    def manifest(self, job: str) -> dict[str, Any]:
        """`GET /jobs/{id}/manifest`: everything that reproduces the job."""
        return self._about(job, "manifest")

    def watch(self, job: str, *, timeout_seconds: float | None = None) -> Iterator[Job]:
        """Yield a job's state now and after each change, until it has ended.

        Raises:
            TimeoutError: It has not ended in time.
        """
        deadline = math.inf if timeout_seconds is None else time.monotonic() + timeout_seconds
        etag: str | None = None
        while True:
            left = deadline - time.monotonic()
            state, etag = self.poll_job(job, wait=max(0.0, min(20.0, left)), etag=etag)
            if state is not None:
                yield state
                if state["status"] in ENDED:
                    return
            if left <= 0:
                raise TimeoutError(f"Job {job} has not ended within {timeout_seconds} s.")

    def wait_for(self, job: str, *, timeout_seconds: float | None = None) -> Job:
        """Wait until a job has ended, and return it when it succeeded.

        Raises:
            JobFailed: It ended without an adapter.
        """
        state = deque(self.watch(job, timeout_seconds=timeout_seconds), maxlen=1).pop()
        if state["status"] != "succeeded":
            raise JobFailed(state)
        return state

    def _silence(self, wait: float | None) -> float | None:
        return None if wait is None else self._connection.timeout_seconds + wait

    def _move(self, job: str, verb: str) -> Job:
        answer = self._connection.json("POST", path_of("jobs", job, verb), idempotent=True)
        return cast("Job", answer)

    def _about(self, job: str, what: str, **params: object) -> dict[str, Any]:
        given = {name: value for name, value in params.items() if value is not None}
        answer = self._connection.json("GET", path_of("jobs", job, what), params=given)
        return cast("dict[str, Any]", answer)

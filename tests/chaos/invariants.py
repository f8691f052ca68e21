"""What must hold whatever died meanwhile: the invariants I1 to I7, read from rows and objects."""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, select
from sqlalchemy.orm import Session

from store.database import transaction
from store.errors import ObjectCorrupt, ObjectMissing
from store.lifecycle import ENDED, STATUS_CHANGED, TRANSITIONS
from store.models import Adapter, Attempt, AttemptOutcome, Checkpoint, Event, Job, JobStatus, Metric
from store.objects import Objects

Effect = Mapping[str, Any]
"""A publication that the rows accepted, as its worker noted it: `job`, `attempt`, `adapter`."""


def violations(
    engine: Engine,
    objects: Objects,
    *,
    accepted: Mapping[str, str],
    effects: Iterable[Effect] = (),
    num_steps: Mapping[str, int] | None = None,
) -> list[str]:
    """Return every breach of the promises; an empty list is what we want.

    Args:
        engine: The rows.
        objects: The bytes.
        accepted: By the name that a client gave its job, the id that it was answered with.
        effects: What the workers saw accepted.
        num_steps: By job id, the metrics that a succeeded job must have, each step once.
    """
    with transaction(engine, read_only=True) as session:
        jobs = {job.id: job for job in session.scalars(select(Job))}
        adapters = list(session.scalars(select(Adapter)))
        found = [
            *_submissions(jobs, accepted),
            *_ends(session, jobs),
            *_attempts(session, jobs),
            *_results(jobs, adapters),
            *_effects(jobs, effects),
            *_metrics(session, jobs, num_steps or {}),
        ]
        prefixes = {adapter.prefix for adapter in adapters}
        prefixes |= set(session.scalars(select(Checkpoint.prefix)))
    return [*found, *_objects(objects, prefixes)]


def _submissions(jobs: Mapping[str, Job], accepted: Mapping[str, str]) -> Iterable[str]:
    """I1: an accepted submission is one row, and nothing was made that nobody asked for."""
    by_name = Counter(job.name for job in jobs.values())
    for name, job_id in accepted.items():
        if job_id not in jobs:
            yield f"I1 lost: {name} was accepted as {job_id}, which is not there"
        elif jobs[job_id].name != name:
            yield f"I1 mixed up: {job_id} was accepted as {name} and is {jobs[job_id].name}"
        if by_name[name] > 1:
            yield f"I1 doubled: {name} has {by_name[name]} rows"
    for name in by_name.keys() - accepted.keys():
        yield f"I1 unasked: {name} has a row and was never accepted"


def _ends(session: Session, jobs: Mapping[str, Job]) -> Iterable[str]:
    """I2: the events lead without a gap, by allowed moves, to one end."""
    expected: dict[str, int] = defaultdict(int)
    status: dict[str, str | None] = {}
    succeeded: Counter[str] = Counter()
    for event in session.scalars(
        select(Event).order_by(Event.job_id, Event.sequence).execution_options(yield_per=5000)
    ):
        expected[event.job_id] += 1
        if event.sequence != expected[event.job_id]:
            yield f"I2 gap: {event.job_id} has event {event.sequence} at {expected[event.job_id]}"
        if event.type != STATUS_CHANGED:
            continue
        before, after = event.payload["from"], event.payload["to"]
        if before != status.get(event.job_id):
            yield f"I2 broken chain: {event.job_id} moves from {before} to {after}"
        if before is not None and JobStatus(after) not in TRANSITIONS[JobStatus(before)]:
            yield f"I2 illegal: {event.job_id} moved from {before} to {after}"
        status[event.job_id] = after
        succeeded[event.job_id] += after == JobStatus.SUCCEEDED
    for job in jobs.values():
        if JobStatus(job.status) not in ENDED:
            yield f"I2 open: {job.id} is {job.status} ({job.status_reason})"
        if status.get(job.id) != job.status or job.last_sequence != expected[job.id]:
            yield f"I2 row and events differ: {job.id} is {job.status}, told {status.get(job.id)}"
        if succeeded[job.id] != (job.status == JobStatus.SUCCEEDED):
            yield f"I2 succeeded {succeeded[job.id]} times: {job.id}"


def _attempts(session: Session, jobs: Mapping[str, Job]) -> Iterable[str]:
    """I4: attempts are numbered without a gap, and none begins before the one before has ended."""
    by_job: dict[str, list[Attempt]] = defaultdict(list)
    for attempt in session.scalars(select(Attempt).order_by(Attempt.job_id, Attempt.number)):
        by_job[attempt.job_id].append(attempt)
    for job in jobs.values():
        own = by_job[job.id]
        if [attempt.number for attempt in own] != list(range(1, job.attempt + 1)):
            yield f"I4 numbers: {job.id} has {[attempt.number for attempt in own]}"
        for earlier, later in pairwise(own):
            if earlier.ended_at is None or earlier.ended_at > later.started_at:
                yield f"I4 overlap: {job.id}, attempts {earlier.number} and {later.number}"
        won = [attempt.number for attempt in own if attempt.outcome == AttemptOutcome.SUCCEEDED]
        wanted = [job.attempt] if job.status == JobStatus.SUCCEEDED else []
        if won != wanted:
            yield f"I4 winner: {job.id} is {job.status} at {job.attempt}; succeeded: {won}"


def _results(jobs: Mapping[str, Job], adapters: Iterable[Adapter]) -> Iterable[str]:
    """I3, I7: one adapter for each job that succeeded, of its team, and none for the others."""
    by_job: dict[str, list[Adapter]] = defaultdict(list)
    for adapter in adapters:
        if adapter.job_id is not None:
            by_job[adapter.job_id].append(adapter)
    for job in jobs.values():
        named = (job.result or {}).get("adapter")
        wanted = [named] if job.status == JobStatus.SUCCEEDED else []
        if [adapter.id for adapter in by_job[job.id]] != wanted:
            yield f"I3 results: {job.id} is {job.status} and has {len(by_job[job.id])} adapters"
        for adapter in by_job[job.id]:
            if adapter.team != job.team:
                yield f"I7 team: {adapter.id} is {adapter.team}'s, its job {job.team}'s"


def _effects(jobs: Mapping[str, Job], effects: Iterable[Effect]) -> Iterable[str]:
    """I5: what a worker saw accepted is what the row says: of its attempt, once."""
    seen: dict[str, str] = {}
    for effect in effects:
        job = jobs.get(effect["job"])
        if job is None:
            yield f"I5 effect of no job: {effect}"
            continue
        if effect["attempt"] != job.attempt:
            yield f"I5 zombie: {job.id} is at attempt {job.attempt}, published by {effect}"
        if seen.setdefault(job.id, effect["adapter"]) != effect["adapter"]:
            yield f"I5 twice: {job.id} was published as {seen[job.id]} and {effect['adapter']}"
        if effect["adapter"] != (job.result or {}).get("adapter"):
            yield f"I5 other result: {job.id} has {job.result}, published was {effect}"


def _metrics(
    session: Session, jobs: Mapping[str, Job], num_steps: Mapping[str, int]
) -> Iterable[str]:
    """Metrics are neither lost nor doubled: each step of a succeeded job once."""
    steps: dict[str, list[int]] = defaultdict(list)
    for job_id, step in session.execute(
        select(Metric.job_id, Metric.step).order_by(Metric.job_id, Metric.step)
    ):
        steps[job_id].append(step)
    for job_id, wanted in num_steps.items():
        if jobs[job_id].status == JobStatus.SUCCEEDED and (
            steps[job_id] != list(range(1, wanted + 1))
        ):
            yield f"metrics: {job_id} has {len(steps[job_id])} of {wanted} steps"


def _objects(objects: Objects, prefixes: Iterable[str]) -> Iterable[str]:
    """I3, I6: what a row names is stored, complete, and has the bytes of its manifest."""
    for prefix in sorted(prefixes):
        try:
            manifest = objects.read_manifest(prefix)
            for entry in manifest.files:
                digest = hashlib.sha256(objects.get_bytes(f"{prefix}/{entry.path}")).hexdigest()
                if digest != entry.sha256:
                    yield f"I6 damaged: {prefix}/{entry.path}"
        except (ObjectMissing, ObjectCorrupt) as error:
            yield f"I6 missing: {prefix}: {error}"


def read_effects(files: Iterable[Path]) -> list[Effect]:
    """Return the lines of the workers' files; a line that a kill cut short is no effect."""
    found: list[Effect] = []
    for file in files:
        for line in file.read_text().splitlines() if file.exists() else []:
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
    return found

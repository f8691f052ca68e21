"""How jobs stand: their place in the queue, why they wait, and which bell calls for them."""

from functools import cached_property

from sqlalchemy.orm import Session

from api.presentation import present_job
from api.schemas.jobs import JobRead
from api.services import Services
from store import workers
from store.job_rows import JobRow
from store.models import Job, JobStatus
from store.positions import MAX_POSITION, Positions
from store.queue import TRAINING_QUEUES, candidate_devices, serving_device


class Standing:
    """Shows the jobs of one transaction, for which the workers are looked at once."""

    def __init__(self, session: Session, services: Services) -> None:
        self._session = session
        self._seen_within_seconds = services.settings.worker_seen_seconds

    def show(self, job: Job | JobRow) -> JobRead:
        """Return a job with its place in the queue, and why it waits longer than that."""
        if job.status != JobStatus.QUEUED:
            return present_job(job)
        position = self._positions.place(job)
        reason = None
        if serving_device(job.queue, self._live) is None:
            devices = " or ".join(repr(each) for each in candidate_devices(job.queue))
            reason = f"No live worker serves the queue {devices}; the job starts when one does."
        elif job.not_before is not None and job.attempt > 0:
            reason = f"Waits until {job.not_before.isoformat()} after an attempt that failed."
        elif position is None:
            reason = f"More than {MAX_POSITION} jobs come first."
        return present_job(job, position=position, reason=reason)

    def bell(self, job: Job) -> str | None:
        """Return the queue to ring for a job; none where it does not wait, or no worker may hear.

        A job that names its device rings also while no worker of it is live.
        """
        if job.status != JobStatus.QUEUED:
            return None
        if job.queue in TRAINING_QUEUES:
            return job.queue
        return serving_device(job.queue, self._live)

    @cached_property
    def _live(self) -> set[str]:
        return workers.live_queues(self._session, seen_within_seconds=self._seen_within_seconds)

    @cached_property
    def _positions(self) -> Positions:
        return Positions(self._session, self._live)

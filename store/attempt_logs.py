"""The log of an attempt among the objects: whole once the attempt has ended, in chunks before.

A chunk is one part of a log that grows: `CHUNK_BYTES` each, the last one shorter. Readers ask for
ranges of the log and do not see the chunks.
"""

from dataclasses import dataclass
from typing import Final

from store.errors import ObjectMissing
from store.objects import Objects
from store.orphans import live_log_prefix, log_key

CHUNK_BYTES: Final = 128 * 1024
"""The last chunk is written again with each heartbeat while the log grows, for days perhaps: with
1 MiB that was 20 GB a day at a beat of two seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredLog:
    """What of a log is stored."""

    size_bytes: int
    is_whole: bool
    """False while the attempt runs, and for good when its worker died."""


def chunk_key(job_id: str, attempt: int, index: int) -> str:
    """Return where a chunk of a growing log is stored."""
    return f"{live_log_prefix(job_id, attempt)}/{index:06d}"


def find_log(objects: Objects, job_id: str, attempt: int) -> StoredLog | None:
    """Return what of an attempt's log is stored; none where nothing is."""
    try:
        return StoredLog(size_bytes=objects.size_bytes(log_key(job_id, attempt)), is_whole=True)
    except ObjectMissing:
        pass
    sizes = [found.size_bytes for found in objects.list(live_log_prefix(job_id, attempt))]
    return StoredLog(size_bytes=sum(sizes), is_whole=False) if sizes else None


def read_log(objects: Objects, job_id: str, attempt: int, *, start: int, length: int) -> bytes:
    """Return a range of an attempt's log; less of it where less is stored.

    Raises:
        ObjectMissing: If nothing of the log is stored.
    """
    try:
        return objects.get_range(log_key(job_id, attempt), start=start, length=length)
    except ObjectMissing:
        if find_log(objects, job_id, attempt) is None:
            raise
    try:
        return _read_chunks(objects, job_id, attempt, start=start, length=length)
    except ObjectMissing:  # the whole log has taken the place of its chunks meanwhile
        return objects.get_range(log_key(job_id, attempt), start=start, length=length)


def delete_chunks(objects: Objects, job_id: str, attempt: int) -> None:
    """Delete the chunks of a log that is stored as a whole."""
    objects.delete_prefix(live_log_prefix(job_id, attempt))


def _read_chunks(objects: Objects, job_id: str, attempt: int, *, start: int, length: int) -> bytes:
    data = bytearray()
    while length > len(data):
        index, offset = divmod(start + len(data), CHUNK_BYTES)
        wanted = min(length - len(data), CHUNK_BYTES - offset)
        try:
            piece = objects.get_range(
                chunk_key(job_id, attempt, index), start=offset, length=wanted
            )
        except ObjectMissing:
            if index == 0 or offset > 0:
                raise
            break  # the log ends where a chunk does
        data += piece
        if len(piece) < wanted:
            break
    return bytes(data)

"""Moments as an operator writes them."""

from datetime import UTC, datetime


def moment(text: str) -> datetime:
    """Return a moment: a date alone is its beginning in UTC.

    Raises:
        ValueError: If it is none, or a time of day comes without a time zone.
    """
    found = datetime.fromisoformat(text)
    if found.tzinfo is None and len(text) > len("2027-01-31"):
        raise ValueError("a time of day needs a time zone, as 2027-01-31T12:00:00Z")
    return found.replace(tzinfo=UTC) if found.tzinfo is None else found

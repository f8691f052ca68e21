"""What an object store's errors mean, and what an operator does about them."""

from typing import Final

_REMEDIES: Final = (
    ("NoSuchBucket", "the bucket does not exist", "create the bucket that GRIT_OBJECTS_URL names"),
    (
        "InvalidAccessKeyId",
        "the access key is unknown there",
        "check GRIT_S3_ACCESS_KEY_ID and GRIT_S3_ENDPOINT",
    ),
    (
        "SignatureDoesNotMatch",
        "the secret does not belong to the access key",
        "check GRIT_S3_SECRET_ACCESS_KEY",
    ),
    (
        "403 Forbidden",
        "access is denied",
        "check GRIT_S3_ACCESS_KEY_ID, GRIT_S3_SECRET_ACCESS_KEY and the rights of the key",
    ),
    (
        "error sending request",
        "it cannot be reached",
        "check GRIT_S3_ENDPOINT, and that the object store runs there",
    ),
    (
        "Permission denied",
        "this user may not write there",
        "check the owner of the folder that GRIT_OBJECTS_URL names",
    ),
)


def is_missing_bucket(error: Exception) -> bool:
    """Tell whether an error that says "not found" is about the whole bucket."""
    return "NoSuchBucket" in str(error)


def describe(error: Exception) -> str:
    """Return an error in one line, with what to do about it where that is known."""
    words = str(error)
    for mark, meaning, advice in _REMEDIES:
        if mark in words:
            return f"{meaning} ({advice})"
    return words.strip().splitlines()[0] if words.strip() else type(error).__name__

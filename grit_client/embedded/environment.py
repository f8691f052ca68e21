"""What the service's processes inherit: the caller's environment and how this home is wired.

The client may not import the store, so settings travel as `GRIT_*` variables. What the caller has
set wins, but for the home, the key file and the broker, which are the supervisor's to decide.
"""

import hashlib
import os
from collections.abc import Mapping
from urllib.parse import urlsplit

from grit_client.home import Home

EMBEDDED_DEFAULTS: Mapping[str, str] = {
    # Threads that wait must sleep: spinning ones took a training step from 0.5 s to 5 s (and thrice
    # the CPU time) on two cores that did something else as well. The bytes are the same.
    "OMP_WAIT_POLICY": "PASSIVE",
    "GRIT_ALLOWED_MODELS": '["*"]',  # one owner: what they may read, they may train
    "GRIT_HEARTBEAT_SECONDS": "2",
    "GRIT_LEASE_SECONDS": "15",
    "GRIT_REAPER_SECONDS": "2",
    "GRIT_STOP_GRACE_SECONDS": "20",
    "PYTHONUNBUFFERED": "1",
}


def queue_prefix(home: Home) -> str:
    """A part of the broker for this home only, so that homes with one `--broker` do not meet.

    Otherwise the inference workers of one would take the requests of the other.
    """
    return f"grit-{hashlib.sha256(str(home.folder).encode()).hexdigest()[:12]}:"


def child_environment(home: Home, *, broker_url: str) -> dict[str, str]:
    """The environment of every process of the service."""
    # Handed on, not read: children inherit the caller's settings.
    own = dict(os.environ)  # noqa: TID251
    if urlsplit(broker_url).password is not None:  # the caller's is of another broker
        own["GRIT_BROKER_PASSWORD"] = ""
    return {
        **EMBEDDED_DEFAULTS,
        "GRIT_QUEUE_PREFIX": queue_prefix(home),
        **own,
        "GRIT_HOME": str(home.folder),
        "GRIT_KEY_FILE": str(home.key_file),
        "GRIT_BROKER_URL": broker_url,
    }

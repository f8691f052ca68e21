"""What the service's processes inherit: the caller's environment and how this home is wired.

The client may not import the store, so settings travel as `GRIT_*` variables. What the caller has
set wins, but for the home, the key file and the broker, which are the supervisor's to decide.
"""

import hashlib
import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Final
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

TRAIN_SHARE: Final = "GRIT_TRAIN_DEVICE_MEMORY_SHARE"
INFER_SHARE: Final = "GRIT_INFER_DEVICE_MEMORY_SHARE"
DEFAULT_SHARES: Final[Mapping[str, float]] = {TRAIN_SHARE: 0.6, INFER_SHARE: 0.35}
"""Of a CUDA card's memory: each has both workers. The rest is for the contexts of their processes,
which no share counts. On MPS, whose memory is the machine's, only the caller sets one."""
_SMALLEST_SHARE: Final = 0.05


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


def worker_environment(environment: Mapping[str, str], *, kind: str) -> dict[str, str]:
    """Return the environment of a worker of a device.

    Args:
        environment: Of every process of the service.
        kind: `cuda`, `mps` or `cpu`.
    """
    return {**environment, **(memory_shares(environment) if kind == "cuda" else {})}


def memory_shares(own: Mapping[str, str]) -> dict[str, str]:
    """Return the share of a card's memory of each kind of worker, as the variables of a process.

    Args:
        own: The caller's environment. What it sets stays; where it sets one of the two, the other
            gets what that leaves.
    """
    both = sum(DEFAULT_SHARES.values())
    shares = {name: own.get(name) or f"{share:g}" for name, share in DEFAULT_SHARES.items()}
    for name, other in ((TRAIN_SHARE, INFER_SHARE), (INFER_SHARE, TRAIN_SHARE)):
        if own.get(other) and not own.get(name):
            # Nonsense is refused by its name: the other one is not to be refused beside it.
            with suppress(ValueError):
                left = both - float(own[other])
                shares[name] = f"{min(both, max(_SMALLEST_SHARE, left)):.2f}"
    return shares

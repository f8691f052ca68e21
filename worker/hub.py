"""Ask the hub, once and briefly, whether it has a model.

Loading a model that is not there would ask for each of its files and ask again after errors, which
takes most of a minute. Here one request says it, within a bound that also covers the search for the
host's address.
"""

from __future__ import annotations

import queue
import threading
from dataclasses import dataclass
from typing import Any, Final

from grit_core.library_errors import reason

MAX_PENDING: Final = 256
"""Questions under way in this process, those that were given up included."""
_FILE: Final = "config.json"
_pending = threading.BoundedSemaphore(MAX_PENDING)


@dataclass(frozen=True, kw_only=True, slots=True)
class HubAnswer:
    """What is known of a hub id."""

    failure: str | None = None
    """A code of `store.base_models.LOOK_UP_FAILURES`, if the model cannot be fetched."""
    message: str = ""
    """The failure in words."""
    offline: bool = False
    """Whether the model has to be read from this machine's cache, without the hub."""


def look_up(model: str, *, timeout_seconds: float) -> HubAnswer:
    """Ask the hub for the model's configuration, or find it in this machine's cache.

    Args:
        model: A hub id, such as `org/name`.
        timeout_seconds: Longest wait for the answer.
    """
    if not _pending.acquire(blocking=False):
        return _unreachable(model, f"{MAX_PENDING} questions wait for its answer already")
    answers: queue.SimpleQueue[HubAnswer] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(_ask(model, timeout_seconds=timeout_seconds))
        except Exception as error:  # noqa: BLE001 - whatever the network does is the answer
            answers.put(_unreachable(model, reason(error)))
        finally:
            _pending.release()

    # Nothing ends a search for a host's address early, so it may go on in a thread of its own.
    threading.Thread(target=ask, name="hub", daemon=True).start()
    try:
        found = answers.get(timeout=timeout_seconds)
    except queue.Empty:
        found = _unreachable(model, f"no answer within {timeout_seconds:g} s (GRIT_HUB_SECONDS)")
    if found.failure == "hub_unreachable" and _is_cached(model):
        return HubAnswer(offline=True)
    return found


def load_library() -> None:
    """Load what the first question would load within its bound."""
    from huggingface_hub import errors, get_hf_file_metadata  # noqa: F401, PLC0415 - see `_ask`


def _ask(model: str, *, timeout_seconds: float) -> HubAnswer:
    # A library of requests, loaded by the first question and by workers only.
    import huggingface_hub as hub  # noqa: PLC0415
    from huggingface_hub import constants, errors  # noqa: PLC0415

    constants.HF_HUB_DISABLE_TELEMETRY = True  # which would ask the hub a question of its own first
    try:
        hub.get_hf_file_metadata(
            hub.hf_hub_url(model, _FILE), token=hub.get_token(), timeout=timeout_seconds
        )
    except errors.GatedRepoError:
        words = (
            f"The model {model!r} is gated on the hub: accept its terms there, and start the"
            " workers with an HF_TOKEN of that account."
        )
        return HubAnswer(failure="model_gated", message=words)
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        words = (
            f"The hub has no public model {model!r} (for a private one, set HF_TOKEN for the"
            " workers)."
            if hub.get_token() is None
            else f"The hub has no model {model!r} that the workers' HF_TOKEN may read."
        )
        return HubAnswer(failure="model_not_found", message=words)
    except errors.EntryNotFoundError:
        words = f"The hub's repository {model!r} has no {_FILE}, so it is no transformers model."
        return HubAnswer(failure="model_not_found", message=words)
    except errors.OfflineModeIsEnabled:
        return _unreachable(model, "HF_HUB_OFFLINE is set")
    return HubAnswer()


def _unreachable(model: str, why: str) -> HubAnswer:
    words = (
        f"The hub cannot be reached from the workers ({why.rstrip('.')}), and the model"
        f" {model!r} is not in their cache."
    )
    return HubAnswer(failure="hub_unreachable", message=words)


def _is_cached(model: str) -> bool:
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415 - as above

    found: Any = try_to_load_from_cache(model, _FILE)
    return isinstance(found, str)

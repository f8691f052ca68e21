"""What is wrong with the name of a base model, and which names may have been meant."""

import difflib
import re
from typing import Final

from sqlalchemy.orm import Session

from store import adapters, base_models, jobs
from store.errors import NotFound
from store.ids import is_id

_NEAREST: Final = 3
_LISTED: Final = 20
_HUB_ADDRESS: Final = re.compile(
    r"(?:hf://|(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/)([\w.-]+/[\w.-]+)"
)
"""An address of a model's page on the hub, and the id in it."""


def describe_wrong_model(session: Session, team: str, name: str) -> str:
    """Say what a name is that is no registered base model, and name those that are nearest to it.

    Args:
        session: A transaction that reads.
        team: Whose adapters and jobs may be spoken of.
        name: What was written as `model`.
    """
    other = describe_other_id(session, team, name)
    if other is not None:
        return other
    named = adapters.list_adapters(session, team=team, name=name, limit=1).rows
    if named:
        return _describe_adapter(session, team, named[0].id, name=name)
    hint = suggest_models(session, name)
    return f"The model {name!r} is not registered. {hint} POST /models registers one."


def describe_other_id(session: Session, team: str, name: str) -> str | None:
    """Say what an id of this service is that stands where a base model's belongs."""
    if is_id(name, "adp"):
        return _describe_adapter(session, team, name)
    if is_id(name, "job"):
        return _describe_job(session, team, name)
    if is_id(name, "ds"):
        return f"{name!r} is the id of a dataset, and `model` names a base model; see GET /models."
    return None


def describe_other_model(session: Session, team: str, name: str) -> str | None:
    """Say which adapter's id was meant by its name or its job; for `model` of `/v1`."""
    if is_id(name, "job"):
        found = adapters.adapter_of_job(session, name, team=team)
        return None if found is None else f"The adapter of this job is {found.id}."
    named = adapters.list_adapters(session, team=team, name=name, limit=_NEAREST).rows
    if not named:
        return None
    return f"It is the name of an adapter; send its id: {' or '.join(row.id for row in named)}."


def suggest_hub_id(source: str) -> str:
    """Return the hub id in an address of the hub, as a question; nothing for other texts."""
    found = _HUB_ADDRESS.match(source)
    return f" Did you mean {found[1]}?" if found else ""


def suggest_models(session: Session, name: str) -> str:
    """Name the registered base models, those first whose ids are nearest to a name."""
    known = sorted(base_models.names(session), key=lambda each: -_nearness(name, each))
    near = [
        each for each in known[:_NEAREST] if _nearness(name, each) >= 0.6
    ]  # difflib's own bound
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    more = f" and {len(known) - _LISTED} more" if len(known) > _LISTED else ""
    return f"{hint}Registered: {', '.join(known[:_LISTED]) or 'none'}{more}."


def _describe_adapter(session: Session, team: str, id: str, *, name: str | None = None) -> str:  # noqa: A002
    try:
        base = adapters.get_adapter(session, id, team=team).model
    except NotFound:
        return f"{id!r} is the id of an adapter, and `model` names a base model; see GET /models."
    what = f"{id!r} is" if name is None else f"{name!r} is the name of {id},"
    sent = "its id" if name is None else id
    return (
        f"{what} an adapter of the model {base!r}, and `model` names a base model. To train or"
        f" to chat with that model, write {base!r}; to ask the adapter, send {sent} as `adapter` to"
        " POST /infer, or as `model` to POST /v1/chat/completions."
    )


def _describe_job(session: Session, team: str, name: str) -> str:
    try:
        base = jobs.get_job(session, name, team=team).model
    except NotFound:
        return f"{name!r} is the id of a job, and `model` names a base model; see GET /models."
    return (
        f"{name!r} is a job on the model {base!r}, and `model` names a base model. To train that"
        f" model, write {base!r}; to ask what the job has trained, send its id as `job` to POST"
        " /infer."
    )


def _nearness(name: str, known: str) -> float:
    """Compare whole ids and their last parts, without case: 1 is equal."""
    pairs = ((name, known), (name.rpartition("/")[2], known.rpartition("/")[2]))
    return max(
        difflib.SequenceMatcher(None, one.casefold(), other.casefold()).ratio()
        for one, other in pairs
    )

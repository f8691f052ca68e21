"""What is wrong with the name of a base model, and which names may have been meant."""

import difflib
from typing import Final

from sqlalchemy.orm import Session

from store import adapters, base_models, jobs
from store.errors import NotFound
from store.ids import is_id

_NEAREST: Final = 3
_LISTED: Final = 20


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
    return f"The model {name!r} is not registered. {suggest_models(session, name)}"


def describe_other_id(session: Session, team: str, name: str) -> str | None:
    """Say what an id of this service is that stands where a base model's belongs."""
    if is_id(name, "adp"):
        return _describe_adapter(session, team, name)
    if is_id(name, "job"):
        return _describe_job(session, team, name)
    if is_id(name, "ds"):
        return f"{name!r} is the id of a dataset, and `model` names a base model; see GET /models."
    return None


def suggest_models(session: Session, name: str) -> str:
    """Name the registered base models, those first whose ids are nearest to a name."""
    known = sorted(base_models.names(session), key=lambda each: -_nearness(name, each))
    near = [
        each for each in known[:_NEAREST] if _nearness(name, each) >= 0.6
    ]  # difflib's own bound
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    more = f" and {len(known) - _LISTED} more" if len(known) > _LISTED else ""
    return f"{hint}Registered: {', '.join(known[:_LISTED]) or 'none'}{more}."


def _describe_adapter(session: Session, team: str, name: str) -> str:
    try:
        base = adapters.get_adapter(session, name, team=team).model
    except NotFound:
        return f"{name!r} is the id of an adapter, and `model` names a base model; see GET /models."
    return (
        f"{name!r} is an adapter of the model {base!r}, and `model` names a base model. To train or"
        f" to chat with that model, write {base!r}; to ask the adapter, send its id as `adapter` to"
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

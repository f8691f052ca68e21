"""What all bodies of OpenAI's clients have in common."""

from typing import Any

from pydantic import model_validator

from api.schemas.fields import Body


class ClientBody(Body):
    """Base of bodies under `/v1`: an unknown field that is null says nothing, and is let through.

    Clients dump their objects whole, with a null for whatever a newer service may send.
    """

    @model_validator(mode="before")
    @classmethod
    def _without_unknown_nulls(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        known = cls.model_fields
        return {name: item for name, item in value.items() if item is not None or name in known}

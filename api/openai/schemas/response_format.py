"""`response_format` on the wire: free text, a JSON object, or JSON of a schema."""

from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, StrictStr
from pydantic import model_validator as whole

from api.schemas.fields import Body, Line

SCHEMA_POINTER: Final = "/response_format/json_schema/schema"


class JsonSchemaFormat(Body):
    """A schema and its name."""

    name: Annotated[Line, Field(min_length=1, max_length=64)] | None = None
    """Not read."""
    description: StrictStr | None = None
    """Not read: the model sees the messages only."""
    json_schema: Annotated[dict[str, Any], Field(alias="schema")]
    """The answer is held to it, `strict` or not."""
    strict: Annotated[bool, Field(strict=True)] | None = None
    """Answers are always held to the schema."""


class ResponseFormat(Body):
    """What an answer is held to."""

    type: Literal["text", "json_object", "json_schema"]
    """Free text, any JSON object, or JSON that fits `json_schema`."""
    json_schema: JsonSchemaFormat | None = None
    """The schema, with the type `json_schema`."""
    object_schema: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    """Of a `json_object`, as some servers and instructor write it."""

    @whole(mode="after")
    def _fits(self) -> Self:
        """Check that a schema is there where the type needs one, and only there.

        Raises:
            ValueError: If it is not.
        """
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise ValueError("`json_schema` belongs to the type json_schema, and only there")
        if self.object_schema is not None and self.type != "json_object":
            raise ValueError("`schema` belongs to the type json_object, and only there")
        return self

    @property
    def answer_schema(self) -> dict[str, Any] | None:
        """The schema of the answers; none for free text."""
        if self.json_schema is not None:
            return self.json_schema.json_schema
        if self.type != "json_object":
            return None
        return {"type": "object"} if self.object_schema is None else self.object_schema

    @property
    def schema_pointer(self) -> str:
        """Where the schema stands in the request."""
        return "/response_format/schema" if self.type == "json_object" else SCHEMA_POINTER

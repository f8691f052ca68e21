"""The OpenAPI document of `/v1`: its errors have their own form."""

from typing import Any, Final

from api.openai.errors import code_of, status_of
from api.openai.schemas.errors import OpenAIErrorAnswer
from api.schemas.problems import PROBLEM_MEDIA_TYPE

PREFIX: Final = "/v1"
_METHODS: Final = ("get", "post", "put", "patch", "delete")
_REFERENCE: Final = "#/components/schemas/{model}"


def describe(schema: dict[str, Any]) -> dict[str, Any]:
    """Return an OpenAPI document whose operations under `/v1` answer errors in OpenAI's form."""
    answer = OpenAIErrorAnswer.model_json_schema(ref_template=_REFERENCE)
    schemas = schema["components"]["schemas"]
    schemas.update(answer.pop("$defs", {}))
    schemas[OpenAIErrorAnswer.__name__] = answer
    for path, methods in schema["paths"].items():
        if path.startswith(f"{PREFIX}/"):
            for method in _METHODS:
                if method in methods:
                    methods[method]["responses"] = _told(methods[method]["responses"])
    return schema


def _told(responses: dict[str, Any]) -> dict[str, Any]:
    told: dict[str, Any] = {}
    words: dict[str, list[str]] = {}
    for status, response in responses.items():
        problems = response.get("content", {}).get(PROBLEM_MEDIA_TYPE)
        if problems is None:
            told[status] = response
            continue
        for code in problems["examples"]:
            words.setdefault(str(status_of(code)), []).append(code)
    reference = {"$ref": _REFERENCE.format(model=OpenAIErrorAnswer.__name__)}
    for status, codes in words.items():
        told[status] = {
            "description": ", ".join(f"`{code}`" for code in sorted({*map(code_of, codes)})),
            "content": {"application/json": {"schema": reference}},
        }
    return dict(sorted(told.items()))

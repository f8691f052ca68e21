"""The OpenAPI document: every error of every route, with its code, beside the answers."""

from collections.abc import Sequence
from typing import Any, Final

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from api.errors import KINDS
from api.examples import body_examples
from api.schemas.problems import PROBLEM_MEDIA_TYPE, ProblemDocument, problem_type

_EVERYWHERE: Final = ("bad_request", "headers_too_large", "internal_error")
_WITH_KEY: Final = (
    "auth_missing",
    "auth_invalid",
    "scope_missing",
    "rate_limited",
    "storage_unavailable",
)
_WITH_JSON: Final = (
    "body_missing",
    "json_invalid",
    "json_too_deep",
    "json_duplicate_key",
    "number_not_finite",
    "encoding_invalid",
    "body_too_large",
    "unsupported_media_type",
    "request_invalid",
)
_METHODS: Final = ("get", "post", "put", "patch", "delete")
_PATH_PARAMETERS: Final = {
    "adapter_id": "Id of an adapter, `adp_...`.",
    "dataset_id": "Id of a dataset, `ds_...`.",
    "file_id": "Id of a file, `ds_...`.",
    "fine_tuning_job_id": "Id of a job, `job_...`.",
    "job_id": "Id of a job, `job_...`.",
    "key_id": "Id of a key, `key_...`.",
    "model": "A base model or an adapter, as `GET /v1/models` lists them.",
    "model_id": "Id of a base model; it may have slashes.",
    "name": "Name of the preset or team.",
}
"""What stands in a path, described in one place for all routes."""


def problems(*codes: str) -> dict[int | str, dict[str, Any]]:
    """Return the `responses` of a route that may answer with these problems.

    Raises:
        LookupError: If a code is not in the table of kinds.
    """
    unknown = [code for code in codes if code not in KINDS]
    if unknown:
        raise LookupError(f"unknown problem codes: {', '.join(unknown)}")
    found: dict[int | str, dict[str, Any]] = {}
    for code in dict.fromkeys(codes):
        found.setdefault(KINDS[code].status, {"codes": []})["codes"].append(code)
    return {status: _response(entry["codes"]) for status, entry in found.items()}


def _response(codes: Sequence[str]) -> dict[str, Any]:
    words = "; ".join(f"`{code}`: {KINDS[code].title}" for code in codes)
    media = {
        "schema": {"$ref": "#/components/schemas/ProblemDocument"},
        "examples": {code: {"$ref": f"#/components/examples/{code}"} for code in codes},
    }
    return {"description": words, "content": {PROBLEM_MEDIA_TYPE: media}, "x-codes": list(codes)}


def _example(code: str) -> dict[str, Any]:
    kind = KINDS[code]
    return {
        "type": problem_type(code),
        "title": kind.title,
        "status": kind.status,
        "detail": f"{kind.title}.",
        "code": code,
        "request_id": "req_0123456789abcdef01234567",
        "errors": [],
    }


def document(app: FastAPI) -> dict[str, Any]:
    """Return the app's OpenAPI document; what every route may answer is filled in here."""
    schema = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes
    )
    components = schema.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    problem = ProblemDocument.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas.update(problem.pop("$defs", {}))
    schemas["ProblemDocument"] = problem
    components["examples"] = {code: {"value": _example(code)} for code in KINDS}
    components["securitySchemes"] = {
        "bearer": {
            "type": "http",
            "scheme": "bearer",
            "bearerFormat": "grit_<prefix>_<secret>",
            "description": "An API key of a team, with the scopes read, write, infer or admin.",
        }
    }
    for path, methods in schema["paths"].items():
        for method in _METHODS:
            if method in methods:
                _describe_path(methods[method])
                _add_examples(f"{method.upper()} {path}", methods[method])
                _complete(methods[method])
    return schema


def _describe_path(operation: dict[str, Any]) -> None:
    for parameter in operation.get("parameters", ()):
        if parameter["in"] == "path" and "description" not in parameter:
            parameter["description"] = _PATH_PARAMETERS[parameter["name"]]


def _add_examples(name: str, operation: dict[str, Any]) -> None:
    for media in operation.get("requestBody", {}).get("content", {}).values():
        media["examples"] = body_examples(name)


def _complete(operation: dict[str, Any]) -> None:
    """Add what follows from a route's shape: its key, its body, its parameters."""
    responses = operation.setdefault("responses", {})
    codes = list(_EVERYWHERE)
    if "security" in operation:
        codes += _WITH_KEY
    body = operation.get("requestBody", {}).get("content", {})
    if body:
        codes.append("request_timeout")
    if "application/json" in body:
        codes += _WITH_JSON
    validates = "422" in responses and "x-codes" not in responses["422"]
    if validates:
        del responses["422"]
        codes.append("request_invalid")
    elif operation.get("parameters"):
        codes.append("request_invalid")
    for response in responses.values():
        codes += response.pop("x-codes", [])
    for status, response in problems(*codes).items():
        response.pop("x-codes")
        responses[str(status)] = response
    operation["responses"] = dict(sorted(responses.items()))

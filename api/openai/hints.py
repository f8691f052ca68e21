"""What a request for an unknown path was meant for: OpenAI's clients at another base URL."""

import re
from typing import Final

from fastapi import Request

from api.links import link, route_path

_RESOURCES: Final = (
    *("assistants", "audio", "batches", "chat", "completions", "containers", "conversations"),
    *("embeddings", "engines", "evals", "files", "fine_tuning", "fine-tunes", "images", "models"),
    *("moderations", "realtime", "responses", "skills", "threads", "uploads", "vector_stores"),
    "videos",
)
_RESOURCE: Final = re.compile(rf"/(?:{'|'.join(_RESOURCES)})(?:/.*)?")
_AT_A_WRONG_BASE: Final = re.compile(r"/(?:v1|(?:api|openai)(?:/v1)?)(?P<path>/.*)")
_INSTEAD: Final = {
    "/completions": "ask POST {base}/chat/completions with `messages`",
    "/responses": "ask POST {base}/chat/completions with `messages`",
    "/embeddings": "models answer chats here, and make no embeddings",
    "/batches": "send the requests to POST {base}/chat/completions, several at a time",
    "/uploads": "send a file to POST {base}/files",
}
_THERE_IS: Final = (
    "Of OpenAI's API there are {base}/chat/completions, {base}/models, {base}/files and"
    " {base}/fine_tuning/jobs."
)


def find_hint(request: Request) -> str | None:
    """Return what to do instead of a request for an unknown path, if OpenAI's clients sent it."""
    path, base = route_path(request.scope), link("/v1")
    if path == "/v1" or path.startswith("/v1/"):
        rest = path.removeprefix("/v1")
        nested = _AT_A_WRONG_BASE.fullmatch(rest)
        if nested and _RESOURCE.fullmatch(nested["path"]):
            return _other_base(nested["path"], base)
        instead = next((words for start, words in _INSTEAD.items() if _begins(rest, start)), None)
        words = "" if instead is None else f"Instead, {instead}. "
        return (words + _THERE_IS).format(base=base)
    nested = _AT_A_WRONG_BASE.fullmatch(path)
    meant = nested["path"] if nested else path
    return _other_base(meant, base) if _RESOURCE.fullmatch(meant) else None


def _other_base(path: str, base: str) -> str:
    return (
        f"OpenAI's clients take a base_url that ends in {base}, once: this request is then for"
        f" {base}{path}."
    )


def _begins(path: str, start: str) -> bool:
    return path == start or path.startswith(f"{start}/")

"""OpenAI's clients at the root paths, where they are not meant to be."""

from http import HTTPStatus

from fastapi import HTTPException, Request


def refuse_openai_clients(request: Request) -> None:
    """Answer OpenAI's clients as at an unknown path, where a path means another thing here.

    `GET /models` lists base models in our own shape and no adapters: that client would show half of
    what `GET /v1/models` lists. The answer says so (`api.openai.hints`).

    Raises:
        HTTPException: If one of them asks.
    """
    if "x-stainless-lang" in request.headers:
        raise HTTPException(HTTPStatus.NOT_FOUND)

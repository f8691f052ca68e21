"""A route of this service: who may ask, then the body as strict JSON, then the endpoint."""

from collections.abc import Callable, Coroutine
from typing import Any, Final

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute

from api.auth import PUBLIC, Doorkeeper, access_of
from api.errors import Problem
from api.strict_json import read_json

_MAX_NAME: Final = 512


class ServiceRoute(APIRoute):
    """Refuses to exist without an access rule; authenticates before a byte of the body is read."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        self.access = access_of(endpoint)
        if self.access != PUBLIC:
            extra = dict(options.get("openapi_extra") or {})
            extra.update({"security": [{"bearer": []}], "x-scope": str(self.access)})
            options["openapi_extra"] = extra
        super().__init__(path, endpoint, **options)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return FastAPI's handler behind our own checks."""
        handle = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            doorkeeper: Doorkeeper = request.app.state.doorkeeper
            request.state.caller = await doorkeeper.admit(request, self.access)
            _refuse_odd_names(request)
            if self.body_field is not None:
                max_bytes = request.app.state.services.settings.max_body_bytes
                request = await read_json(request, max_bytes=max_bytes)
            return await handle(request)

        return guarded


def _refuse_odd_names(request: Request) -> None:
    # Nothing that we name is so long or has such characters, and PostgreSQL refuses NUL.
    for value in request.path_params.values():
        text = str(value)
        if len(text) > _MAX_NAME or not text.isprintable():
            raise Problem("not_found", "There is nothing of this name.")


def service_router(*tags: str) -> APIRouter:
    """Return a router whose routes are all `ServiceRoute`s."""
    return APIRouter(route_class=ServiceRoute, tags=list(tags))

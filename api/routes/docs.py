"""The page that shows the OpenAPI document: Swagger UI, with every file served from here.

The page needs no network beyond the service: FastAPI's own page loads its script from a CDN.
"""

from importlib import resources
from pathlib import Path
from typing import Final

import fastapi_offline
from fastapi.responses import FileResponse

from api.auth import allow_anyone
from api.errors import Problem
from api.routing import ServiceRouter

router = ServiceRouter("service")

_OURS: Final = Path(str(resources.files("api"))) / "docs_page"
_SWAGGER_UI: Final = Path(str(resources.files(fastapi_offline))) / "static"
_FILES: Final = {
    "start.js": (_OURS, "text/javascript"),
    "swagger-ui-bundle.js": (_SWAGGER_UI, "text/javascript"),
    "swagger-ui.css": (_SWAGGER_UI, "text/css"),
    "favicon.png": (_SWAGGER_UI, "image/png"),
}
"""Each with its folder; a path of the request is never joined to one."""
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self';"
    " img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'"
)
_CACHED: Final = {"Cache-Control": "public, max-age=3600"}


@router.get("/docs", include_in_schema=False)
@allow_anyone
async def show_document() -> FileResponse:
    """Return the page."""
    return FileResponse(
        _OURS / "index.html",
        media_type="text/html",
        headers={"Content-Security-Policy": _POLICY},
    )


@router.get("/docs/{name}", include_in_schema=False)
@allow_anyone
async def read_asset(name: str) -> FileResponse:
    """Return a file of the page."""
    if name not in _FILES:
        raise Problem("not_found", f"The page has no file {name!r}.")
    folder, media_type = _FILES[name]
    return FileResponse(folder / name, media_type=media_type, headers=_CACHED)

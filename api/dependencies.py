"""What FastAPI hands to the endpoints: coroutines, because each other function costs a thread."""

from typing import Annotated

from fastapi import Depends, Request

from api.services import Services
from store.keys import Caller


async def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


async def _caller(request: Request) -> Caller:
    caller: Caller = request.state.caller
    return caller


ServicesDep = Annotated[Services, Depends(_services)]
"""The parts of the deployment."""
CallerDep = Annotated[Caller, Depends(_caller)]
"""Who asks; only on routes that require a scope."""

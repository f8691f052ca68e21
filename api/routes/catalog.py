"""What a job may name: presets, devices, and the schema of the job itself."""

from functools import cache
from typing import Any

from fastapi import Response

from api.auth import requires
from api.dependencies import ServicesDep
from api.devices import training_devices
from api.documents import problems
from api.errors import Problem
from api.routing import ServiceRouter
from api.schemas.catalog import DeviceList, DeviceRead, PresetList, PresetRead, StrategyRead
from api.schemas.jobs import JobCreate
from grit_core.config.devices import DeviceStrategy, choose_device
from grit_core.config.presets import describe_preset, describe_unknown_preset, preset_names
from grit_core.errors import DeviceUnavailable
from store import workers
from store.database import transaction
from store.keys import Scope
from store.models import Worker
from store.queue import TRAINING_QUEUES, inference_queue

router = ServiceRouter("catalog")


@router.get("/presets")
@requires(Scope.READ)
async def list_presets() -> PresetList:
    """List the named configurations."""
    return PresetList(data=[_preset(name) for name in preset_names()])


@router.get("/presets/{name}", response_model=PresetRead, responses=problems("not_found"))
@requires(Scope.READ)
async def read_preset(name: str) -> Response:
    """Return a named configuration."""
    if name not in preset_names():
        raise Problem("not_found", describe_unknown_preset(name))
    return Response(_preset_json(name), media_type="application/json")


@cache
def _preset_json(name: str) -> bytes:
    # Presets are part of the program; only known names get here.
    return _preset(name).model_dump_json().encode()


def _preset(name: str) -> PresetRead:
    return PresetRead.model_validate(describe_preset(name))


@router.get("/devices")
@requires(Scope.READ)
def list_devices(services: ServicesDep) -> DeviceList:
    """List the devices that live workers serve, and what each strategy chooses among them."""
    seconds = services.settings.worker_seen_seconds
    with transaction(services.engine, read_only=True) as session:
        seen = workers.live_workers(session, seen_within_seconds=seconds)
    live = training_devices(seen)
    devices = [found for found in (_device(name, seen) for name in TRAINING_QUEUES) if found]
    return DeviceList(
        data=devices, strategies=[_strategy(each, live) for each in DeviceStrategy if live]
    )


def _device(name: str, seen: list[Worker]) -> DeviceRead | None:
    training = [worker for worker in seen if name in worker.queues]
    inference = [worker for worker in seen if inference_queue(name) in worker.queues]
    if not training and not inference:
        return None
    details = [worker.details for worker in training + inference if worker.details]
    return DeviceRead(
        name=name,
        training_workers=len(training),
        inference_workers=len(inference),
        details=details,
    )


def _strategy(strategy: DeviceStrategy, live: tuple[str, ...]) -> StrategyRead:
    try:
        choice = choose_device(strategy, live)
    except DeviceUnavailable as error:
        return StrategyRead(name=strategy, device=None, reason=str(error))
    return StrategyRead(name=strategy, device=choice.device, reason=choice.reason)


@router.get("/schema/job")
@requires(Scope.READ)
def read_job_schema() -> dict[str, Any]:
    """Return the JSON Schema of the body of `POST /jobs`."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **JobCreate.model_json_schema(),
    }

"""Inference: a request goes through the mailbox to a worker, and its answer comes back."""

from fastapi import Request

from api.auth import requires
from api.dependencies import CallerDep, ServicesDep
from api.documents import problems
from api.inference import answer_of, ask, prepare
from api.routing import service_router
from api.schemas.infer import InferAnswer, InferRequest
from store.keys import Scope

router = service_router("inference")


@router.post(
    "/infer",
    responses=problems(
        "not_found",
        "adapter_not_ready",
        "model_not_ready",
        "streaming_unavailable",
        "inference_failed",
        "inference_broken",
        "inference_timeout",
        "no_inference_worker",
        "too_many_waiting",
        "queue_unavailable",
    ),
)
@requires(Scope.INFER)
async def infer(
    request: Request, body: InferRequest, caller: CallerDep, services: ServicesDep
) -> InferAnswer:
    """Answer with a base model, or with an adapter over it."""
    question = await prepare(services, caller.team, body)
    reply = await ask(services, request, question)
    return answer_of(question, reply)

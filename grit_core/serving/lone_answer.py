"""Answers of models whose rows cannot share steps: one request at a time, by transformers."""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from grit_core.serving.constraint import Constraint
from grit_core.serving.ticket import Ticket


@torch.inference_mode()
def answer_alone(ticket: Ticket) -> None:
    """Answer a request from its first token to its last, with the adapter of its slot."""
    resident, request = ticket.resident, ticket.request
    resident.slots.route_all(ticket.slot)
    options: dict[str, Any] = {
        "max_new_tokens": request.max_new_tokens,
        "do_sample": not ticket.greedy,
        "num_beams": 1,
        "pad_token_id": resident.encoder.pad_token_id,
        "stopping_criteria": StoppingCriteriaList([_Listener(ticket)]),
    }
    if ticket.constraint is not None:
        options["logits_processor"] = LogitsProcessorList([_Mask(ticket, ticket.constraint)])
    if not ticket.greedy:
        options |= {"temperature": request.temperature, "top_p": request.top_p, "top_k": 0}
    devices = [resident.device] if resident.device.type == "cuda" else []
    with (
        resident.images.of(resident.features_of(ticket.prompt, ticket.adapter)),
        torch.random.fork_rng(devices=devices),
    ):
        if not ticket.greedy:
            torch.manual_seed(ticket.seed)
        resident.model.generate(**resident.placed(ticket.prompt), **options)


class _Mask(LogitsProcessor):  # type: ignore[misc]  # mypy follows no transformers
    """Takes the tokens out that the request does not allow next."""

    def __init__(self, ticket: Ticket, constraint: Constraint) -> None:
        self._ticket, self._constraint = ticket, constraint

    def __call__(self, _input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._ticket.ids:  # the mask of the first token is there
            self._constraint.prepare()
        held = scores.clone()
        self._constraint.apply(held[0])
        if bool(held.isneginf().all()):
            self._constraint.fail("the rules of the model itself leave no token")
        # The answer ends with this token where none is left.
        return held if self._constraint.fault is None else scores


class _Listener(StoppingCriteria):  # type: ignore[misc]  # mypy follows no transformers
    """Hands every token to the request and ends the answer where the request does."""

    def __init__(self, ticket: Ticket) -> None:
        self._ticket = ticket

    def __call__(self, input_ids: Tensor, _scores: Tensor, **_options: Any) -> Tensor:
        ended = self._ticket.take(int(input_ids[0, -1])) or self._ticket.stopped
        return torch.full((len(input_ids),), ended, device=input_ids.device)

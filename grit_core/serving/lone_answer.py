"""Answers of models whose rows cannot share steps: one request at a time, by transformers."""

from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

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


class _Listener(StoppingCriteria):  # type: ignore[misc]  # mypy follows no transformers
    """Hands every token to the request and ends the answer where the request does."""

    def __init__(self, ticket: Ticket) -> None:
        self._ticket = ticket

    def __call__(self, input_ids: Tensor, _scores: Tensor, **_options: Any) -> Tensor:
        ended = self._ticket.take(int(input_ids[0, -1])) or self._ticket.stopped
        return torch.full((len(input_ids),), ended, device=input_ids.device)

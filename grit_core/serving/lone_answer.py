"""Answers of models whose rows cannot share steps: one request at a time, by transformers.

transformers runs the model and applies the model's own rules to the logits. The token is chosen
here, as in shared steps: a seed means the same, and no random state of the process is touched.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from grit_core.serving.ticket import Ticket
from grit_core.serving.token_chooser import TokenChooser


@torch.inference_mode()
def answer_alone(ticket: Ticket) -> None:
    """Answer a request from its first token to its last, with the adapter of its slot."""
    resident = ticket.resident
    resident.slots.route_all(ticket.slot)
    choice = _Choice(ticket)
    with resident.images.of(resident.features_of(ticket.prompt, ticket.adapter)):
        resident.model.generate(
            **resident.placed(ticket.prompt),
            max_new_tokens=ticket.request.max_new_tokens,
            do_sample=False,  # what is left to choose from is one token
            num_beams=1,
            pad_token_id=resident.encoder.pad_token_id,
            logits_processor=LogitsProcessorList([choice]),
            stopping_criteria=StoppingCriteriaList([_End(choice)]),
        )


class _Choice(LogitsProcessor):  # type: ignore[misc]  # mypy follows no transformers
    """Chooses every token, hands it to the request and leaves transformers nothing else."""

    def __init__(self, ticket: Ticket) -> None:
        self._ticket = ticket
        self._chooser = TokenChooser([ticket], device=ticket.resident.device)
        self.has_ended = False

    def __call__(self, _input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.has_ended:  # transformers may look a step late whether the answer has ended
            return scores
        constraint = self._ticket.constraint
        if constraint is not None and self._ticket.ids:  # the mask of the first token is there
            constraint.prepare()
        (token,) = self._chooser.choose(scores.clone())
        if constraint is not None and not constraint.allows(token):
            constraint.fail("the rules of the model itself leave no token")
        self.has_ended = self._ticket.take(token) or self._ticket.stopped
        forced = torch.full_like(scores, -torch.inf)
        forced[:, token] = 0
        return forced


class _End(StoppingCriteria):  # type: ignore[misc]  # mypy follows no transformers
    """Ends the answer where the request does."""

    def __init__(self, choice: _Choice) -> None:
        self._choice = choice

    def __call__(self, input_ids: Tensor, _scores: Tensor, **_options: Any) -> Tensor:
        return torch.full((len(input_ids),), self._choice.has_ended, device=input_ids.device)

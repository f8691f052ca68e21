"""Requests on a device, without the engine's threads: steps happen when a test takes them."""

from functools import cache

import torch

from grit_core.generation import GenerationRequest
from grit_core.grammars import json_schema_grammar
from grit_core.records import parse_prompt
from grit_core.serving.batch import Batch
from grit_core.serving.constraint import MaskThread
from grit_core.serving.resident_model import Prompt, ResidentModel
from grit_core.serving.ticket import Ticket

KINDS = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "seed": 1},
    "nucleus": {"temperature": 0.8, "top_p": 0.9, "seed": 2},
    "held": {"grammar": json_schema_grammar({"type": "array"})},
    "held and sampled": {
        "grammar": json_schema_grammar({"type": "string", "minLength": 200}),
        "temperature": 1.5,
        "seed": 3,
    },
}
"""What requests ask for."""

BOUNDS = {
    "num_slots": 8,
    "max_adapter_bytes": 1 << 24,
    "image_cache_bytes": 1 << 20,
    "prefix_cache_bytes": 0,
}


@cache
def load(folder, device="sim"):
    """Load a model to where it answers; tests share it, and leave no request in it."""
    return ResidentModel.load(str(folder), device=torch.device(device), dtype="float32", **BOUNDS)


def ask(resident, text, *, adapter=None, **options):
    """Return a request that nothing has been done for."""
    chat = parse_prompt([{"role": "user", "content": text}])
    request = GenerationRequest(chat=chat, **{"max_new_tokens": 200, **options})
    inputs = resident.encoder.encode_prompt(chat.messages, [])
    prompt = Prompt(inputs=inputs, images=(), image_tokens=0)
    return Ticket(request, prompt, resident, adapter=adapter, load_seconds=0.0)


class Rows:
    """A batch that requests join and take steps in."""

    def __init__(self, resident):
        self.resident, self.masks = resident, MaskThread()
        self.batch = Batch(resident, masks=self.masks, max_rows=16)

    @torch.inference_mode()
    def join(self, ticket):
        """Run the prompt of a request and let it join."""
        if ticket.adapter is not None:
            ticket.slot = self.resident.slots.acquire(ticket.adapter)
        prefilled = self.resident.prefill(ticket.prompt, slot=ticket.slot, adapter=ticket.adapter)
        assert not ticket.begin(prefilled)
        self.batch.join(ticket, prefilled)
        return ticket

    @torch.inference_mode()
    def step(self):
        """Take one."""
        self.batch.step()

"""A request as its model reads it, within the model's context and the device's memory."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import torch
from PIL import Image

from grit_core.data.encoder import ChatEncoder
from grit_core.data.image_decoding import decode_image
from grit_core.errors import Fault, InvalidConfig, InvalidDataset
from grit_core.library_errors import library_errors_as, reason
from grit_core.records import Role
from grit_core.serving.answers import GenerationRequest
from grit_core.serving.resident_model import Prompt, ResidentModel
from grit_core.serving.tool_answers import find_hidden_token_ids
from grit_core.tools.call_format import CallFormat


def encode_request(resident: ResidentModel, request: GenerationRequest) -> Prompt:
    """Read the images and write the chat as the model reads it."""
    images = [decode_image(data, index=i) for i, data in enumerate(request.chat.images)]
    # Tokenizers are not made to be shared by two threads.
    with resident.encoding, library_errors_as(explain_refused_chat):
        inputs, calls = _encode_chat(resident.encoder, request, images)
    return Prompt(
        inputs=inputs,
        calls=calls,
        hidden_token_ids=(
            None
            if calls is None or request.tools is None
            else find_hidden_token_ids(resident.encoder.tokenizer, calls)
        ),
        images=tuple(hashlib.sha256(data).hexdigest() for data in request.chat.images),
        image_tokens=int(
            torch.isin(inputs["input_ids"], resident.encoder.image_token_ids).sum().item()
        ),
    )


def fit_request(
    request: GenerationRequest, prompt: Prompt, resident: ResidentModel
) -> GenerationRequest:
    """Return a request whose answer fits after its prompt: into context and memory.

    The sentences are those of OpenAI and others: clients look for their words (LiteLLM for
    "maximum context length", LangChain for "prompt is too long") to cut a chat and ask again.

    Raises:
        InvalidConfig: The prompt leaves no room for an answer, or not for one that was asked for.
    """
    wanted, prompt_tokens = request.max_new_tokens, len(prompt.ids_T)
    bounds = [n for n in (resident.max_positions, resident.max_device_tokens) if n is not None]
    most = min(bounds, default=prompt_tokens + wanted)
    if prompt_tokens + wanted <= most:
        return request
    room = most - prompt_tokens
    if room > 0 and request.shorten_to_fit:
        return replace(request, max_new_tokens=room)
    if room > 0:
        pointer, what = "/max_new_tokens", "messages or the completion"
        asked = (
            f"you requested {prompt_tokens + wanted} tokens ({prompt_tokens} in the messages,"
            f" {wanted} in the completion): the prompt is too long for such an answer"
        )
    else:
        pointer, what = "/messages", "messages"
        asked = f"your messages resulted in {prompt_tokens} tokens: the prompt is too long"
    where = ""
    if most != resident.max_positions:
        where = (
            f" on the device {resident.device}, whose memory has room for no more keys and values"
        )
    detail = (
        f"This model's maximum context length is {most} tokens{where}. However, {asked}."
        f" Please reduce the length of the {what}."
    )
    raise InvalidConfig([Fault(pointer=pointer, code="request_too_large", detail=detail)])


def _encode_chat(
    encoder: ChatEncoder, request: GenerationRequest, images: Sequence[Image.Image]
) -> tuple[dict[str, torch.Tensor], CallFormat | None]:
    """Return the model's arguments, and how the answer writes calls where the chat has tools."""
    messages = request.chat.messages
    if request.tools is None and not any(
        message.tool_calls or message.role is Role.TOOL for message in messages
    ):
        return encoder.encode_prompt(messages, images), None
    tools = () if request.tools is None else request.tools.tools
    return encoder.encode_tool_prompt(messages, images, tools)


def explain_refused_chat(error: Exception) -> InvalidDataset:
    """Say that the model or its processor refuses a chat, and why."""
    return InvalidDataset(
        f"the model or its processor refuses the chat: {reason(error)}; look at its images and at"
        " the order of its messages"
    )

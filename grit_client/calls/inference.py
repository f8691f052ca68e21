"""Ask a base model or an adapter."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from grit_client.answer_stream import AnswerStream
from grit_client.answers import Generation
from grit_client.calls.resource import Calls
from grit_client.errors import InvalidInput
from grit_client.images import data_url

INFER_SILENCE_SECONDS = 300.0
"""A cold model may have to be loaded first."""


class InferenceCalls(Calls):
    """`POST /infer`."""

    def infer(
        self,
        prompt: str | None = None,
        *,
        images: Sequence[str | Path | bytes] = (),
        job: str | None = None,
        adapter: str | None = None,
        model: str | None = None,
        messages: Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> Generation:
        """`POST /infer`: an answer of one of an adapter, a job's adapter, or a base model.

        Args:
            prompt: The question; or give `messages`.
            images: Files, bytes or `data:` URLs, put before the prompt.
            job: The job whose adapter answers.
            adapter: The adapter that answers.
            model: The base model that answers, without an adapter.
            messages: A whole chat, in the shape of dataset rows.
            **options: `max_new_tokens`, `temperature`, `top_p`, `seed`, `stop`, `tools`,
                `tool_choice`, `parallel_tool_calls`, and `schema`, a JSON schema that the answer is
                held to.

        Not exactly one of `job`, `adapter` and `model`, or of `prompt` and `messages`, raises
        `InvalidInput`.
        """
        targets = {"job": job, "adapter": adapter, "model": model}
        body = _body(targets, prompt, messages, images) | options
        answer = self._connection.json(
            "POST", "/infer", json=body, silence_seconds=INFER_SILENCE_SECONDS
        )
        return cast("Generation", answer)

    def stream(
        self,
        prompt: str | None = None,
        *,
        images: Sequence[str | Path | bytes] = (),
        job: str | None = None,
        adapter: str | None = None,
        model: str | None = None,
        messages: Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> AnswerStream:
        """`POST /infer` with `stream`: the same answer while it is written.

        Use it in a `with` block and iterate over it; see `AnswerStream`. An answer that breaks off
        raises, and is never taken for a short one. The arguments are those of `infer`.
        """
        targets = {"job": job, "adapter": adapter, "model": model}
        body = _body(targets, prompt, messages, images) | options | {"stream": True}
        response = self._connection.asked(
            "/infer", json=body, accept="text/event-stream", silence_seconds=INFER_SILENCE_SECONDS
        )
        return AnswerStream(response)


def _body(
    targets: Mapping[str, str | None],
    prompt: str | None,
    messages: Sequence[Mapping[str, Any]] | None,
    images: Sequence[str | Path | bytes],
) -> dict[str, Any]:
    """Write the part of the request that says who is asked what.

    Raises:
        InvalidInput: None or several are asked, or nothing, or two things.
    """
    body: dict[str, Any] = {name: value for name, value in targets.items() if value is not None}
    if len(body) != 1:
        raise InvalidInput("Name exactly one of job, adapter and model to answer.")
    if (prompt is None) == (messages is None):
        raise InvalidInput("Give either a prompt or messages.")
    if messages is not None:
        body["messages"] = list(messages)
    else:
        body["prompt"] = prompt
    if images:
        body["images"] = [data_url(image) for image in images]
    return body

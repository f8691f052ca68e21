"""litellm, which names models `openai/<id>`."""

import json

import litellm
from harness import QUESTION, TARGET, check, expect, run, wait_for
from pydantic import BaseModel, Field

MODEL = f"openai/{TARGET.model}"
WHERE = {"api_base": TARGET.url, "api_key": TARGET.key}
litellm.num_retries = 0


class Reading(BaseModel):
    """What is on the picture."""

    digit: int = Field(ge=0, le=9)
    inverted: bool


NOTE = {
    "type": "function",
    "function": {
        "name": "note",
        "parameters": {
            "type": "object",
            "properties": {"digit": {"type": "integer", "minimum": 0, "maximum": 9}},
            "required": ["digit"],
        },
    },
}


def complete(messages: list[object] | None = None, **options: object) -> object:
    """Ask the model."""
    options.setdefault("temperature", 0)
    return litellm.completion(model=MODEL, messages=messages or TARGET.question, **WHERE, **options)


@check("chat")
def _chat() -> None:
    expect(complete().choices[0].message.content, TARGET.answer, "the answer")


@check("stream")
def _stream() -> None:
    chunks = list(complete(stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    expect(text, TARGET.answer, "the joined pieces")
    built = litellm.stream_chunk_builder(chunks, messages=TARGET.question)
    expect(built.choices[0].message.content, TARGET.answer, "the built answer")


@check("usage")
def _usage() -> None:
    whole = complete().usage
    expect(whole.prompt_tokens + whole.completion_tokens, whole.total_tokens, "the total")
    chunks = list(complete(stream=True, stream_options={"include_usage": True}))
    used = [chunk.usage for chunk in chunks if getattr(chunk, "usage", None)]
    expect(used[-1].total_tokens, whole.total_tokens, "the streamed total")


@check("echo")
def _echo() -> None:
    message = complete().choices[0].message
    built = litellm.stream_chunk_builder(list(complete(stream=True))).choices[0].message
    for form in (message, message.model_dump(), built, built.model_dump()):
        complete([*TARGET.question, form, {"role": "user", "content": QUESTION}], max_tokens=8)


@check("structured output")
def _structured() -> None:
    answer = complete(response_format=Reading, temperature=1)
    Reading.model_validate_json(answer.choices[0].message.content)
    answer = complete(response_format={"type": "json_object"}, max_tokens=200, temperature=0)
    expect(answer.choices[0].message.content.lstrip()[0], "{", "an object's beginning")


@check("tools")
def _tools() -> None:
    answer = complete(tools=[NOTE], tool_choice="required")
    message = answer.choices[0].message
    call = message.tool_calls[0]
    expect(json.loads(call.function.arguments)["digit"] in range(10), True, "the argument")
    result = {"role": "tool", "tool_call_id": call.id, "content": "noted"}
    complete([*TARGET.question, message, result], tools=[NOTE], max_tokens=8)
    chunks = list(complete(tools=[NOTE], tool_choice="required", stream=True))
    built = litellm.stream_chunk_builder(chunks).choices[0].message
    expect(built.tool_calls[0].function.name, "note", "the streamed function")


@check("files")
def _files() -> None:
    options = {"custom_llm_provider": "openai", **WHERE}
    with TARGET.rows.open("rb") as rows:
        made = litellm.create_file(file=rows, purpose="fine-tune", **options)
    expect(litellm.file_retrieve(made.id, **options).id, made.id, "the file")
    content = litellm.file_content(made.id, **options).content
    expect(len(content.splitlines()), len(TARGET.rows.read_text().splitlines()), "lines")
    expect(litellm.file_delete(made.id, **options).deleted, True, "deleted")


@check("jobs")
def _jobs() -> None:
    options = {"custom_llm_provider": "openai", **WHERE}
    with TARGET.rows.open("rb") as rows:
        made = litellm.create_file(file=rows, purpose="fine-tune", **options)
    job = litellm.create_fine_tuning_job(
        model=TARGET.model, training_file=made.id, hyperparameters={"n_epochs": 1}, **options
    )
    read = lambda: litellm.retrieve_fine_tuning_job(job.id, **options).status  # noqa: E731
    wait_for(read, "succeeded")
    listed = litellm.list_fine_tuning_jobs(limit=5, **options)
    expect(job.id in {each.id for each in listed.data}, True, "listed")


@check("errors")
def _errors() -> None:
    for options, kind in (
        ({"api_key": "wrong"}, litellm.AuthenticationError),
        ({"model": "openai/no-such-model"}, litellm.NotFoundError),
        ({"messages": TARGET.too_long}, litellm.ContextWindowExceededError),
        ({"temperature": 7}, litellm.BadRequestError),
    ):
        asked = {"model": MODEL, "messages": TARGET.question, **WHERE, **options}
        try:
            litellm.completion(**asked)
        except kind as error:
            exact = type(error)
            expect(exact, kind, "the class of the error")
        else:
            raise AssertionError(f"no {kind.__name__}")


run()

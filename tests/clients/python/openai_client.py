"""The official `openai` package: run under version 2 and under version 3."""

import json
from enum import StrEnum

import openai
from harness import QUESTION, TARGET, check, expect, run, wait_for
from pydantic import BaseModel, Field

client = openai.OpenAI(base_url=TARGET.url, api_key=TARGET.key, max_retries=1)
chat = client.chat.completions


class Certainty(StrEnum):
    """A choice among three."""

    LOW = "low"
    MIDDLE = "middle"
    HIGH = "high"


class Reading(BaseModel):
    """What is on the picture."""

    digit: int = Field(ge=0, le=9)
    certainty: Certainty
    inverted: bool | None


READ = {
    "type": "function",
    "function": {
        "name": "note",
        "description": "Note the digit.",
        "parameters": {
            "type": "object",
            "properties": {"digit": {"type": "integer", "minimum": 0, "maximum": 9}},
            "required": ["digit"],
            "additionalProperties": False,
        },
    },
}


@check("chat")
def _chat() -> None:
    answer = chat.create(model=TARGET.model, messages=TARGET.question, temperature=0)
    expect(answer.choices[0].message.content, TARGET.answer, "the answer")
    expect(answer.choices[0].finish_reason, "stop", "finish_reason")
    raw = chat.with_raw_response.create(model=TARGET.model, messages=TARGET.question, temperature=0)
    expect(bool(raw.headers.get("x-request-id")), True, "a request id")


@check("stream")
def _stream() -> None:
    with chat.create(
        model=TARGET.model, messages=TARGET.question, temperature=0, stream=True
    ) as stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    expect(text, TARGET.answer, "the joined pieces")
    with chat.stream(model=TARGET.model, messages=TARGET.question, temperature=0) as events:
        kinds = {event.type for event in events}
        final = events.get_final_completion()
    expect(final.choices[0].message.content, TARGET.answer, "the final completion")
    expect({"chunk", "content.delta", "content.done"} <= kinds, True, f"events {sorted(kinds)}")


@check("usage")
def _usage() -> None:
    whole = chat.create(model=TARGET.model, messages=TARGET.question, temperature=0).usage
    expect(whole.prompt_tokens + whole.completion_tokens, whole.total_tokens, "the total")
    stream = chat.create(
        model=TARGET.model,
        messages=TARGET.question,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    last = list(stream)[-1]
    expect(last.choices, [], "the choices of the last chunk")
    expect(last.usage.total_tokens, whole.total_tokens, "the streamed total")


@check("echo")
def _echo() -> None:
    plain = chat.create(model=TARGET.model, messages=TARGET.question).choices[0].message
    parsed = chat.parse(model=TARGET.model, messages=TARGET.question, response_format=Reading)
    with chat.stream(model=TARGET.model, messages=TARGET.question) as events:
        streamed = events.get_final_completion().choices[0].message
    for message in (plain, parsed.choices[0].message, streamed):
        for form in (message, message.model_dump(), message.model_dump(exclude_none=True)):
            follow = [*TARGET.question, form, {"role": "user", "content": QUESTION}]
            answer = chat.create(model=TARGET.model, messages=follow, temperature=0, max_tokens=8)
            expect(answer.choices[0].finish_reason in {"stop", "length"}, True, "an answer")


@check("structured output")
def _structured() -> None:
    for temperature in (0, 1):
        parsed = chat.parse(
            model=TARGET.model,
            messages=TARGET.question,
            response_format=Reading,
            temperature=temperature,
        )
        expect(isinstance(parsed.choices[0].message.parsed, Reading), True, "a parsed answer")
    with chat.stream(
        model=TARGET.model, messages=TARGET.question, response_format=Reading
    ) as events:
        final = events.get_final_completion()
    expect(isinstance(final.choices[0].message.parsed, Reading), True, "a parsed stream")


@check("tools")
def _tools() -> None:
    named = {"type": "function", "function": {"name": "note"}}
    for choice in (named, "required"):
        answer = chat.create(
            model=TARGET.model, messages=TARGET.question, tools=[READ], tool_choice=choice
        )
        message = answer.choices[0].message
        call = message.tool_calls[0]
        expect(call.function.name, "note", "the function")
        expect(json.loads(call.function.arguments)["digit"] in range(10), True, "the argument")
        follow = [
            *TARGET.question,
            message,
            {"role": "tool", "tool_call_id": call.id, "content": "noted"},
        ]
        chat.create(model=TARGET.model, messages=follow, tools=[READ], max_tokens=8)
    with chat.stream(
        model=TARGET.model, messages=TARGET.question, tools=[READ], tool_choice="required"
    ) as events:
        message = events.get_final_completion().choices[0].message
    expect(message.tool_calls[0].function.name, "note", "the streamed function")
    chat.create(model=TARGET.model, messages=TARGET.question, tools=[READ], max_tokens=8)


@check("files")
def _files() -> None:
    made = client.files.create(file=TARGET.rows, purpose="fine-tune")
    expect(
        client.files.wait_for_processing(made.id, poll_interval=0.2).status, "processed", "status"
    )
    expect(client.files.retrieve(made.id).id, made.id, "the file")
    expect(made.id in {each.id for each in client.files.list(limit=2)}, True, "listed")
    lines = client.files.content(made.id).text.splitlines()
    expect(len(lines), len(TARGET.rows.read_text().splitlines()), "lines of the content")
    expect(client.files.delete(made.id).deleted, True, "deleted")


@check("jobs")
def _jobs() -> None:
    jobs = client.fine_tuning.jobs
    made = client.files.create(file=TARGET.rows, purpose="fine-tune")
    job = jobs.create(
        model=TARGET.model,
        training_file=made.id,
        suffix="client",
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1}}},
    )
    wait_for(lambda: jobs.retrieve(job.id).status, "succeeded")
    tuned = jobs.retrieve(job.id).fine_tuned_model
    answer = chat.create(model=tuned, messages=TARGET.question, temperature=0)
    expect(answer.model, tuned, "the model that answered")
    expect(tuned in {each.id for each in client.models.list()}, True, "listed as a model")
    expect(job.id in {each.id for each in jobs.list(limit=2)}, True, "listed")
    paused = jobs.create(
        model=TARGET.model, training_file=made.id, extra_body={"grit": {"auto_start": False}}
    )
    expect(jobs.cancel(paused.id).status, "cancelled", "the cancelled job")
    client.models.delete(tuned)


@check("events")
def _events() -> None:
    jobs = client.fine_tuning.jobs
    done = next(job for job in jobs.list() if job.status == "succeeded")
    events = list(jobs.list_events(done.id, limit=2))
    expect(len({event.id for event in events}), len(events), "no event twice over the pages")
    expect(len(events) > 2, True, "more than a page of events")
    expect(any("step" in event.message.lower() for event in events) or bool(events), True, "text")
    list(jobs.checkpoints.list(done.id))


@check("errors")
def _errors() -> None:
    unknown = openai.OpenAI(base_url=TARGET.url, api_key="wrong", max_retries=0)
    for call, kind, code in (
        (unknown.models.list, openai.AuthenticationError, "invalid_api_key"),
        (
            lambda: chat.create(model="no-such-model", messages=TARGET.question),
            openai.NotFoundError,
            "model_not_found",
        ),
        (
            lambda: chat.create(model=TARGET.model, messages=TARGET.too_long),
            openai.BadRequestError,
            "context_length_exceeded",
        ),
    ):
        try:
            call()
        except kind as error:
            expect(error.code, code, "the code")
        else:
            raise AssertionError(f"no {kind.__name__}")
    try:
        chat.create(model=TARGET.model, messages=TARGET.question, temperature=7)
    except openai.BadRequestError as error:
        expect(error.param, "temperature", "the param")
    else:
        raise AssertionError("a temperature of 7 was taken")


run()

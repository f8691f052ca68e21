"""instructor, in the modes that speak to an OpenAI-compatible service."""

import instructor
from harness import QUESTION, TARGET, check, expect, run
from instructor.core import InstructorRetryException
from openai import OpenAI
from pydantic import BaseModel, Field


class Reading(BaseModel):
    """What is on the picture."""

    digit: int = Field(ge=0, le=9)
    inverted: bool


openai = OpenAI(base_url=TARGET.url, api_key=TARGET.key, max_retries=1)


def client(mode: instructor.Mode) -> instructor.Instructor:
    """Return a client in a mode."""
    return instructor.from_openai(openai, mode=mode)


def ask(mode: instructor.Mode, **options: object) -> tuple[Reading, object]:
    """Ask for a reading."""
    return client(mode).chat.completions.create_with_completion(
        model=TARGET.model,
        messages=TARGET.question,
        response_model=Reading,
        max_retries=0,
        **options,
    )


@check("chat")
def _chat() -> None:
    made = client(instructor.Mode.TOOLS).chat.completions.create(
        model=TARGET.model, messages=TARGET.question, response_model=None, temperature=0
    )
    expect(made.choices[0].message.content, TARGET.answer, "the answer without a model")


@check("stream")
def _stream() -> None:
    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
        parts = list(
            client(mode).chat.completions.create_partial(
                model=TARGET.model, messages=TARGET.question, response_model=Reading, max_retries=0
            )
        )
        Reading.model_validate(parts[-1].model_dump())


@check("usage")
def _usage() -> None:
    _, completion = ask(instructor.Mode.TOOLS)
    expect(completion.usage.total_tokens > 0, True, "tokens")


@check("echo")
def _echo() -> None:
    _, completion = ask(instructor.Mode.JSON_SCHEMA)
    follow = [
        *TARGET.question,
        completion.choices[0].message,
        {"role": "user", "content": QUESTION},
    ]
    openai.chat.completions.create(model=TARGET.model, messages=follow, max_tokens=8)


@check("structured output")
def _structured() -> None:
    for mode in (instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT):
        for temperature in (0, 1):
            found, _ = ask(mode, temperature=temperature)
            expect(isinstance(found, Reading), True, str(mode))


@check("tools")
def _tools() -> None:
    found, completion = ask(instructor.Mode.TOOLS)
    call = completion.choices[0].message.tool_calls[0]
    expect(call.function.name, "Reading", "the function")
    expect(Reading.model_validate_json(call.function.arguments).digit, found.digit, "the argument")


@check("errors")
def _errors() -> None:
    try:
        client(instructor.Mode.TOOLS).chat.completions.create(
            model="no-such-model",
            messages=TARGET.question,
            response_model=Reading,
            max_retries=0,
        )
    except InstructorRetryException as error:
        expect("no-such-model" in str(error) or "model" in str(error), True, "the model's name")
    else:
        raise AssertionError("no error")


run()

// The official `openai` package of npm.
import { createReadStream, readFileSync } from "node:fs";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";
import { expect, fails, QUESTION, run, target, waitFor } from "./harness.mjs";

const client = new OpenAI({ baseURL: target.url, apiKey: target.key, maxRetries: 1 });
const chat = client.chat.completions;
const asked = { model: target.model, messages: target.question };

const Reading = z.object({
  digit: z.number().int().min(0).max(9),
  certainty: z.enum(["low", "middle", "high"]),
  inverted: z.boolean().nullable(),
});
const format = zodResponseFormat(Reading, "reading");

const note = {
  type: "function",
  function: {
    name: "note",
    description: "Note the digit.",
    parameters: {
      type: "object",
      properties: { digit: { type: "integer", minimum: 0, maximum: 9 } },
      required: ["digit"],
      additionalProperties: false,
    },
  },
};

await run({
  async chat() {
    const answer = await chat.create({ ...asked, temperature: 0 });
    expect(answer.choices[0].message.content, target.answer, "the answer");
  },
  async stream() {
    const pieces = await chat.create({ ...asked, temperature: 0, stream: true });
    let text = "";
    for await (const chunk of pieces) text += chunk.choices[0]?.delta.content ?? "";
    expect(text, target.answer, "the joined pieces");
    const stream = chat.stream({ ...asked, temperature: 0 });
    expect(await stream.finalContent(), target.answer, "the final content");
  },
  async usage() {
    const whole = await chat.create({ ...asked, temperature: 0 });
    const stream = chat.stream({
      ...asked,
      temperature: 0,
      stream_options: { include_usage: true },
    });
    const usage = await stream.totalUsage();
    expect(usage.total_tokens, whole.usage.total_tokens, "the streamed total");
  },
  async echo() {
    const plain = (await chat.create(asked)).choices[0].message;
    const parsed = (await chat.parse({ ...asked, response_format: format })).choices[0].message;
    const streamed = await chat.stream(asked).finalMessage();
    for (const message of [plain, parsed, streamed]) {
      const messages = [...target.question, message, { role: "user", content: QUESTION }];
      await chat.create({ model: target.model, messages, max_tokens: 8 });
    }
  },
  async "structured output"() {
    const parsed = await chat.parse({ ...asked, response_format: format, temperature: 1 });
    Reading.parse(parsed.choices[0].message.parsed);
    const stream = chat.stream({ ...asked, response_format: format });
    Reading.parse((await stream.finalMessage()).parsed);
  },
  async tools() {
    const options = { ...asked, tools: [note], tool_choice: "required" };
    const message = (await chat.create(options)).choices[0].message;
    const call = message.tool_calls[0];
    expect(call.function.name, "note", "the function");
    const result = { role: "tool", tool_call_id: call.id, content: "noted" };
    const messages = [...target.question, message, result];
    await chat.create({ model: target.model, messages, tools: [note], max_tokens: 8 });
    const streamed = await chat.stream(options).finalMessage();
    expect(streamed.tool_calls[0].function.name, "note", "the streamed function");
    let seen = 0;
    const runner = chat.runTools(
      {
        ...asked,
        tool_choice: "required",
        parallel_tool_calls: false,
        tools: [
          {
            type: "function",
            function: {
              ...note.function,
              parse: JSON.parse,
              function: () => {
                seen += 1;
                return "noted";
              },
            },
          },
        ],
      },
      { maxChatCompletions: 2 },
    );
    await runner.done();
    expect(seen > 0, true, "the runner's call");
  },
  async files() {
    const made = await client.files.create({
      file: createReadStream(target.rows),
      purpose: "fine-tune",
    });
    await waitFor(async () => (await client.files.retrieve(made.id)).status, "processed");
    const content = await (await client.files.content(made.id)).text();
    const lines = readFileSync(target.rows, "utf8").trim().split("\n").length;
    expect(content.trim().split("\n").length, lines, "lines of the content");
    expect((await client.files.delete(made.id)).deleted, true, "deleted");
  },
  async jobs() {
    const file = await client.files.create({
      file: createReadStream(target.rows),
      purpose: "fine-tune",
    });
    const jobs = client.fineTuning.jobs;
    const job = await jobs.create({
      model: target.model,
      training_file: file.id,
      method: { type: "supervised", supervised: { hyperparameters: { n_epochs: 1 } } },
    });
    await waitFor(async () => (await jobs.retrieve(job.id)).status, "succeeded");
    const tuned = (await jobs.retrieve(job.id)).fine_tuned_model;
    await chat.create({ ...asked, model: tuned, max_tokens: 8 });
  },
  async events() {
    const jobs = client.fineTuning.jobs;
    let done;
    for await (const job of jobs.list()) if (job.status === "succeeded") done ??= job;
    const ids = [];
    for await (const event of jobs.listEvents(done.id, { limit: 2 })) ids.push(event.id);
    expect(new Set(ids).size, ids.length, "no event twice over the pages");
    expect(ids.length > 2, true, "more than a page of events");
  },
  async errors() {
    const stranger = new OpenAI({ baseURL: target.url, apiKey: "wrong", maxRetries: 0 });
    const kinds = OpenAI;
    await fails(stranger.models.list(), (e) => e instanceof kinds.AuthenticationError, "a key");
    await fails(
      chat.create({ ...asked, model: "no-such-model" }),
      (e) => e instanceof kinds.NotFoundError && e.code === "model_not_found",
      "a model",
    );
    await fails(
      chat.create({ ...asked, messages: target.tooLong }),
      (e) => e instanceof kinds.BadRequestError && e.code === "context_length_exceeded",
      "a length",
    );
    await fails(
      chat.create({ ...asked, temperature: 7 }),
      (e) => e instanceof kinds.BadRequestError && e.param === "temperature",
      "a temperature",
    );
  },
});

// The AI SDK with its provider for services in OpenAI's shape.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, generateObject, generateText, stepCountIs, streamObject, streamText, tool } from "ai";
import { z } from "zod";
import { expect, fails, QUESTION, run, target } from "./harness.mjs";

const provider = (apiKey = target.key) =>
  createOpenAICompatible({
    name: "grit",
    baseURL: target.url,
    apiKey,
    includeUsage: true,
    supportsStructuredOutputs: true,
  });
const model = provider()(target.model);
const messages = [
  {
    role: "user",
    content: [
      { type: "image", image: target.image, mediaType: "image/png" },
      { type: "text", text: QUESTION },
    ],
  },
];
const asked = { model, messages, temperature: 0, maxRetries: 0 };
const schema = z.object({ digit: z.number().int().min(0).max(9), inverted: z.boolean() });
const note = tool({
  description: "Note the digit.",
  inputSchema: z.object({ digit: z.number().int().min(0).max(9) }),
  execute: async () => "noted",
});

await run({
  async chat() {
    expect((await generateText(asked)).text, target.answer, "the answer");
  },
  async stream() {
    let text = "";
    for await (const piece of streamText(asked).textStream) text += piece;
    expect(text, target.answer, "the joined pieces");
  },
  async usage() {
    const whole = await generateText(asked);
    const stream = streamText(asked);
    await stream.consumeStream();
    expect((await stream.usage).totalTokens, whole.usage.totalTokens, "the streamed total");
  },
  async echo() {
    const whole = await generateText(asked);
    const stream = streamText(asked);
    await stream.consumeStream();
    for (const answer of [whole.response.messages, (await stream.response).messages]) {
      const following = [...messages, ...answer, { role: "user", content: QUESTION }];
      await generateText({ ...asked, messages: following, maxOutputTokens: 8 });
    }
  },
  async "structured output"() {
    const found = await generateObject({ ...asked, schema, temperature: 1 });
    schema.parse(found.object);
    const stream = streamObject({ ...asked, schema });
    for await (const _ of stream.partialObjectStream);
    schema.parse(await stream.object);
  },
  async tools() {
    const providerOptions = { grit: { parallel_tool_calls: false } };
    const options = { ...asked, tools: { note }, toolChoice: "required", providerOptions };
    const first = await generateText(options);
    expect(first.toolCalls[0].toolName, "note", "the tool");
    await generateText({
      ...asked,
      tools: { note },
      maxOutputTokens: 8,
      messages: [...messages, ...first.response.messages],
    });
    const stream = streamText({ ...options, stopWhen: stepCountIs(1) });
    await stream.consumeStream();
    expect((await stream.toolCalls)[0].toolName, "note", "the streamed tool");
  },
  async errors() {
    const status = (code) => (error) => APICallError.isInstance(error) && error.statusCode === code;
    await fails(generateText({ ...asked, model: provider("wrong")(target.model) }), status(401), "key");
    await fails(generateText({ ...asked, model: provider()("no-such-model") }), status(404), "model");
    await fails(generateText({ ...asked, messages: target.tooLong }), status(400), "length");
    await fails(generateText({ ...asked, temperature: 7 }), status(400), "temperature");
  },
});

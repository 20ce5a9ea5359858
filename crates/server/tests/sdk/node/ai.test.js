// The AI SDK with its provider for OpenAI-compatible servers.
import assert from "node:assert/strict";
import { test } from "node:test";

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embedMany, generateText, jsonSchema, stepCountIs, streamText, tool } from "ai";

const provider = createOpenAICompatible({
  name: "baton", baseURL: `${process.env.BATON_URL}/v1`, apiKey: process.env.BATON_KEY, supportsStructuredOutputs: true,
  includeUsage: true,
});
const model = provider("abacus");
const common = { model, temperature: 0, maxRetries: 0, maxOutputTokens: 300 };
const calculator = tool({
  description: "Calculate the value of an expression.",
  inputSchema: jsonSchema({ type: "object", properties: { expression: { type: "string" } }, required: ["expression"] }),
  execute: async ({ expression }) => {
    const [left, right] = expression.split("*").map(Number);
    return String(left * right);
  },
});

test("text and reasoning, whole and streamed", async () => {
  const whole = await generateText({ ...common, prompt: "What is 347 + 286?" });
  assert.equal(whole.text, "347 + 286 = 633.");
  assert.match(whole.reasoningText, /633/);
  const stream = streamText({ ...common, prompt: "What is 347 + 286?" });
  let text = "";
  for await (const part of stream.textStream) text += part;
  assert.equal(text, whole.text);
  assert.equal(await stream.finishReason, "stop");
});

test("a tool is called and its result told", async () => {
  const call = { ...common, prompt: "what is the product of 57258 and 6278", tools: { calculator }, stopWhen: stepCountIs(3) };
  assert.match((await generateText(call)).text, /359465724/);
  const stream = streamText(call);
  let text = "";
  for await (const part of stream.textStream) text += part;
  assert.match(text, /359465724/);
});

test("embeddings", async () => {
  const { embeddings } = await embedMany({ model: provider.textEmbeddingModel("abacus"), values: ["one", "two words"] });
  assert.equal(embeddings[0].length, embeddings[1].length);
});

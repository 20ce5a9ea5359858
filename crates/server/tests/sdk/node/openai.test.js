// The official OpenAI SDK for Node, against a server whose base URL and key are in BATON_URL and BATON_KEY.
import assert from "node:assert/strict";
import { test } from "node:test";

import OpenAI from "openai";

const client = new OpenAI({ baseURL: `${process.env.BATON_URL}/v1`, apiKey: process.env.BATON_KEY, maxRetries: 0 });
const SUM = [{ role: "user", content: "What is 347 + 286?" }];
const ANSWER = "347 + 286 = 633.";
const PRODUCT = "what is the product of 57258 and 6278";
const parameters = { type: "object", properties: { expression: { type: "string" } }, required: ["expression"] };
const CALCULATOR = {
  type: "function",
  function: { name: "calculator", description: "Calculate the value of an expression.", parameters },
};
const chat = more => ({ model: "abacus", messages: SUM, temperature: 0, max_tokens: 300, ...more });

test("a reply has content, reasoning and usage", async () => {
  const reply = await client.chat.completions.create(chat());
  assert.equal(reply.choices[0].message.content, ANSWER);
  assert.match(reply.choices[0].message.reasoning_content, /633/);
  assert.equal(reply.usage.total_tokens, reply.usage.prompt_tokens + reply.usage.completion_tokens);
});

test("a stream joins to the plain reply and ends with usage", async () => {
  let text = "", last;
  for await (const chunk of await client.chat.completions.create(chat({ stream: true, stream_options: { include_usage: true } }))) {
    text += chunk.choices[0]?.delta.content ?? "";
    last = chunk;
  }
  assert.equal(text, ANSWER);
  assert.deepEqual(last.choices, []);
  assert.ok(last.usage.completion_tokens > 0);
});

test("the stream helper accumulates", async () => {
  const stream = client.chat.completions.stream(chat({ n: 2 }));
  const final = await stream.finalChatCompletion();
  assert.deepEqual(final.choices.map(choice => choice.message.content), [ANSWER, ANSWER]);
});

test("a stream that the client leaves is ended", async () => {
  const stream = await client.chat.completions.create(chat({ stream: true, ignore_eos: true }));
  for await (const _ of stream) break;
  stream.controller.abort();
});

test("tools are called, run and answered by the helper", async () => {
  const runner = client.chat.completions.runTools(chat({
    messages: [{ role: "user", content: PRODUCT }],
    tools: [{
      type: "function",
      function: {
        name: "calculator", description: "Calculate the value of an expression.", parameters, parse: JSON.parse,
        function: ({ expression }) => {
          const [left, right] = expression.split("*").map(Number);
          return String(left * right);
        },
      },
    }],
  }));
  assert.match(await runner.finalContent(), /359465724/);
});

test("streamed calls accumulate", async () => {
  const stream = client.chat.completions.stream(chat({ messages: [{ role: "user", content: PRODUCT }], tools: [CALCULATOR] }));
  const { choices: [choice] } = await stream.finalChatCompletion();
  assert.equal(choice.finish_reason, "tool_calls");
  assert.deepEqual(JSON.parse(choice.message.tool_calls[0].function.arguments), { expression: "57258*6278" });
});

test("structured output parses", async () => {
  const schema = { type: "object", properties: { left: { type: "integer" }, kind: { enum: ["sum", "other"] } }, required: ["left", "kind"], additionalProperties: false };
  const response_format = { type: "json_schema", json_schema: { name: "answer", strict: true, schema } };
  const reply = await client.chat.completions.parse(chat({ response_format, max_tokens: 500 }));
  if (reply.choices[0].finish_reason === "stop") assert.ok(Number.isInteger(JSON.parse(reply.choices[0].message.content).left));
});

test("completions, models and embeddings", async () => {
  const completion = await client.completions.create({ model: "abacus", prompt: "hm", max_tokens: 5, logprobs: 1 });
  assert.equal(completion.choices[0].logprobs.tokens.length, 5);
  const names = [];
  for await (const model of client.models.list()) names.push(model.id);
  assert.ok(names.includes("abacus"));
  const embeddings = await client.embeddings.create({ model: "abacus", input: ["one", "two words"] });
  assert.equal(embeddings.data.length, 2);
  assert.equal(embeddings.data[0].embedding.length, embeddings.data[1].embedding.length);
});

test("responses, whole and streamed", async () => {
  const ask = { model: "abacus", input: SUM[0].content, temperature: 0 };
  assert.equal((await client.responses.create(ask)).output_text, ANSWER);
  const stream = client.responses.stream(ask);
  let text = "";
  stream.on("response.output_text.delta", event => { text += event.delta; });
  const final = await stream.finalResponse();
  assert.equal(text, ANSWER);
  assert.equal(final.status, "completed");
});

test("errors are the SDK's classes", async () => {
  for (const stream of [false, true]) {
    await assert.rejects(client.chat.completions.create(chat({ temperature: 3, stream })), OpenAI.BadRequestError);
    await assert.rejects(client.chat.completions.create(chat({ model: "other", stream })), OpenAI.NotFoundError);
  }
  const stranger = new OpenAI({ baseURL: `${process.env.BATON_URL}/v1`, apiKey: "wrong", maxRetries: 0 });
  await assert.rejects(stranger.models.list(), OpenAI.AuthenticationError);
});

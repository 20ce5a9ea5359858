// The conversation: what was said, what is being said, and what stops it.

import { Refusal, call } from "./api.js";
import { get, make } from "./dom.js";
import { Reply } from "./reply.js";
import { events } from "./sse.js";
import * as settings from "./settings.js";

/** What the log shows before anything is said. */
const empty = get("empty");
/** The conversation so far, without the system prompt. Another one is another array. */
let messages = [];
/** Stops the reply that is coming, if one is. */
let coming = null;
/** Whether the end of the log is in sight, and to be kept there. */
let following = true;

/** Makes the chat work. */
export function start() {
  const log = get("log");
  log.addEventListener("scroll", () => following = log.scrollHeight - log.scrollTop - log.clientHeight < 40);
  get("composer").addEventListener("submit", event => {
    event.preventDefault();
    get("prompt").focus();
    say();
  });
  get("prompt").addEventListener("keydown", event => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    say();
  });
  get("stop").addEventListener("click", () => {
    get("prompt").focus();
    coming?.abort();
  });
  get("new-chat").addEventListener("click", () => {
    coming?.abort();
    messages = [];
    log.replaceChildren(empty);
    get("prompt").focus();
  });
  get("settings-toggle").addEventListener("click", () => settings.open());
  get("settings").addEventListener("submit", event => event.preventDefault());
  get("tools").addEventListener("change", settings.check);
  document.addEventListener("keydown", event => {
    if (event.key === "Escape") coming?.abort();
    if (event.key !== "/" || event.target.matches("input, textarea, select") || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    get("prompt").focus();
  });
}

/** Says what stands in the prompt. */
async function say() {
  const prompt = get("prompt");
  const text = prompt.value;
  if (coming || !text.trim() || !settings.check()) return;
  prompt.value = "";
  show(make("article", { className: "turn user" }, make("h3", { textContent: "You" }), make("p", { className: "text", textContent: text })));
  const said = await ask([{ role: "user", content: text }]);
  // To be corrected, or tried again.
  if (!said && !prompt.value) prompt.value = text;
}

/** Asks for the reply to these messages. Whether there is one; otherwise the conversation is as it was. */
async function ask(added) {
  const conversation = messages;
  const { fields, system } = settings.read();
  const stopper = coming = new AbortController();
  const reply = new Reply(fields.model ?? "model", follow);
  following = true;
  show(reply.element);
  busy(true);
  let [how, why] = ["complete", null];
  try {
    const first = system ? [{ role: "system", content: system }] : [];
    const stream_options = { include_usage: true, continuous_usage_stats: true };
    const body = { ...fields, messages: [...first, ...conversation, ...added], stream: true, stream_options };
    const response = await call("v1/chat/completions", { body, signal: stopper.signal });
    reply.generation = response.headers.get("x-baton-generation");
    await take(response, reply);
  } catch (error) {
    [how, why] = stopper.signal.aborted ? ["stopped", null] : ["failed", error.words ?? `the reply broke off: ${error.message}`];
  }
  reply.end(how, why);
  const message = reply.message();
  if (message) conversation.push(...added, message);
  if (message?.tool_calls) reply.element.append(results(message.tool_calls));
  coming = null;
  busy(false);
  follow();
  return message !== null;
}

/** Reads a stream to its end. */
async function take(response, reply) {
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Refusal(response.status, chunk.error);
    reply.take(chunk);
  }
  throw new Refusal(response.status, { message: "the reply broke off" });
}

/** A form for what the tools gave, which answers the model's calls. */
function results(calls) {
  const fields = calls.map(() => make("input", { required: true, autocomplete: "off", spellcheck: false }));
  const labels = calls.map(({ function: { name } }, i) => make("label", {}, `Result of ${name} `, fields[i]));
  const form = make("form", { className: "results" }, ...labels, make("button", { type: "submit", textContent: "Send results" }));
  form.addEventListener("submit", async event => {
    event.preventDefault();
    if (coming || !settings.check()) return;
    const open = available => form.querySelectorAll("input, button").forEach(one => one.disabled = !available);
    open(false);
    get("prompt").focus();
    open(!await ask(calls.map(({ id }, i) => ({ role: "tool", tool_call_id: id, content: fields[i].value }))));
  });
  return form;
}

function show(turn) {
  empty.remove();
  get("log").append(turn);
  follow();
}

function follow() {
  if (following) get("log").scrollTop = get("log").scrollHeight;
}

function busy(is) {
  get("send").hidden = is;
  get("stop").hidden = !is;
}

// One reply of a model, shown while it comes: reasoning, text, calls of tools, and how long it all took.

import { make } from "./dom.js";

const small = (value, digits) => value.toLocaleString("en", { maximumSignificantDigits: digits });

/** Text that grows. It is written once per frame, however many pieces come. */
class Growing {
  #node = new Text();
  #more = "";
  all = "";

  constructor(element) {
    element.append(this.#node);
  }

  add(text) {
    this.all += text;
    this.#more += text;
  }

  write() {
    if (this.#more) this.#node.appendData(this.#more);
    this.#more = "";
  }
}

export class Reply {
  #begun = performance.now();
  #first = null;
  #last = null;
  #usage = null;
  #finish = null;
  #frame = null;
  #painted;
  calls = [];

  /** A reply of this model that has just been asked for. `painted` is told when more of it is shown. */
  constructor(model, painted) {
    this.#painted = painted;
    this.thoughts = make("summary", { textContent: "Reasoning" });
    const reasoning = make("p", { className: "text" });
    this.reasoning = new Growing(reasoning);
    this.folded = make("details", { className: "reasoning", open: true, hidden: true }, this.thoughts, reasoning);
    const text = make("p", { className: "text" });
    this.text = new Growing(text);
    this.tools = make("div", { className: "calls" });
    this.figures = make("p", { className: "figures note", textContent: "waiting for the first token" });
    this.element = make("article", { className: "turn reply", ariaBusy: "true" },
      make("h3", { textContent: model }), this.folded, text, this.tools, this.figures);
  }

  /** Takes a chunk of the stream. */
  take({ choices, usage }) {
    if (usage) this.#usage = usage;
    for (const { delta, finish_reason: finish } of choices) {
      if (finish) this.#finish = finish;
      const { reasoning_content: reasoning, content, tool_calls: calls = [] } = delta;
      if (reasoning || content || calls.length) {
        this.#last = performance.now();
        this.#first ??= this.#last;
      }
      if (reasoning) this.reasoning.add(reasoning);
      // Reasoning is folded once, when the answer begins; from then on it is the reader's.
      if ((content || calls.length) && !this.text.all && !this.calls.length) this.folded.open = false;
      if (content) this.text.add(content);
      calls.forEach(part => this.#call(part));
    }
    this.#frame ??= requestAnimationFrame(() => this.#paint());
  }

  #call({ index, id, function: { name, arguments: text } }) {
    if (!this.calls[index]) {
      const shown = make("pre", { className: "code" });
      const heading = make("h4", {}, "calls ", make("code", { textContent: name }));
      this.calls[index] = { id, name, shown, text: new Growing(shown), element: make("section", { className: "call" }, heading, shown) };
      this.tools.append(this.calls[index].element);
    }
    this.calls[index].text.add(text ?? "");
  }

  #paint() {
    cancelAnimationFrame(this.#frame);
    this.#frame = null;
    [this.reasoning, this.text, ...this.calls.map(call => call.text)].forEach(text => text.write());
    this.folded.hidden = !this.reasoning.all;
    const thought = this.#usage?.completion_tokens_details?.reasoning_tokens;
    this.thoughts.textContent = thought ? `Reasoning, ${small(thought, 6)} tokens` : "Reasoning";
    this.figures.textContent = this.#told(this.#finish ?? "");
    this.#painted();
  }

  /** Tokens, and their times as this page saw them. */
  #told(ending) {
    const parts = [ending];
    const tokens = this.#usage?.completion_tokens ?? 0;
    if (tokens) parts.push(`${small(tokens, 6)} tokens`);
    if (this.#first) parts.push(`first after ${small(this.#first - this.#begun, 3)} ms`);
    const seconds = (this.#last - this.#first) / 1000;
    if (tokens > 1 && seconds > 0) parts.push(`${small((tokens - 1) / seconds, 3)} tokens/s`);
    if (this.generation) parts.push(`generation ${this.generation.slice(0, 12)}`);
    return parts.filter(Boolean).join(" · ");
  }

  /** There is no more of it: it is complete, was stopped, or failed for a reason. */
  end(how, reason) {
    this.#paint();
    this.element.ariaBusy = "false";
    this.element.dataset.end = how;
    this.figures.textContent = this.#told(how === "complete" ? this.#finish ?? "" : how);
    this.calls.forEach(({ shown, text }) => shown.textContent = indented(text.all));
    if (reason) this.element.append(make("p", { className: "refused", role: "alert", textContent: reason }));
  }

  /** The message that it has become; `null` if there is nothing in it to go on from. Calls are there if it is complete. */
  message() {
    const content = this.text.all || null;
    const complete = this.element.dataset.end === "complete" ? this.calls : [];
    const tool_calls = complete.map(({ id, name, text }) => ({ id, type: "function", function: { name, arguments: text.all } }));
    if (tool_calls.length) return { role: "assistant", content, tool_calls };
    return content && { role: "assistant", content };
  }
}

/** JSON with line breaks; what is none as it is. */
function indented(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

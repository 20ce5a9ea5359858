// What is asked of a model besides the conversation.

import { get, tell } from "./dom.js";

/** The fields of a request that are filled in, and the system prompt. Throws a SyntaxError if the tools are no JSON. */
export function read() {
  const model = get("model").value;
  const fields = model ? { model } : {};
  const numbers = { temperature: "temperature", max_tokens: "max-tokens" };
  for (const [field, id] of Object.entries(numbers)) {
    if (get(id).value) fields[field] = get(id).valueAsNumber;
  }
  const tools = get("tools").value.trim();
  if (tools) fields.tools = JSON.parse(tools);
  return { fields, system: get("system").value };
}

/** Whether all fields can be read; those that cannot are shown, with why. */
export function check() {
  const numbers = ["temperature", "max-tokens"].every(id => get(id).checkValidity());
  let why = null;
  try {
    JSON.parse(get("tools").value.trim() || "[]");
  } catch (error) {
    why = `The tools are no JSON: ${error.message}`;
  }
  tell(get("tools-error"), why);
  get("tools").ariaInvalid = String(why !== null);
  if (why || !numbers) open(true);
  if (!numbers) get("settings").reportValidity();
  return numbers && why === null;
}

/** Shows the settings, or not. */
export function open(shown = get("settings").hidden) {
  get("settings").hidden = !shown;
  get("settings-toggle").ariaExpanded = String(shown);
}

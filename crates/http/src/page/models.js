// The models and adapters that can be asked: the choice above the chat, and the list.

import { get, make, tell } from "./dom.js";

let shown = "";

/** Shows what /v1/models lists. */
export function show({ data }) {
  // A choice that is open stays open.
  if (shown === JSON.stringify(data)) return;
  shown = JSON.stringify(data);
  const chosen = get("model").value;
  const name = ({ id, parent }) => parent ? `${id} (adapter)` : id;
  get("model").replaceChildren(...data.map(model => make("option", { value: model.id, textContent: name(model) })));
  if (data.some(model => model.id === chosen)) get("model").value = chosen;
  get("model").disabled = false;
  tell(get("models-error"), null);
  get("model-list").replaceChildren(...data.map(({ id, parent, max_model_len: context }) => make("li", {},
    make("code", { textContent: id }),
    ` ${parent ? `adapter of ${parent}` : "model"}, context of ${context.toLocaleString("en")} tokens`)));
}

/** They are not told. */
export function refuse(refusal) {
  shown = "";
  get("model").replaceChildren(make("option", { textContent: "not available", value: "" }));
  get("model").disabled = true;
  tell(get("models-error"), `Models are not available: ${refusal.words}`);
  get("model-list").replaceChildren(make("li", { className: "refused", textContent: `Not available: ${refusal.words}` }));
}

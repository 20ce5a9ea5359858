// Elements. Text from outside becomes text, never markup: nothing of the page writes HTML.

/** The element of this id. */
export const get = id => document.getElementById(id);

/** An element with these properties (and data attributes, in `data`), around children. */
export function make(tag, { data = {}, ...properties } = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  Object.assign(element.dataset, data);
  element.append(...children);
  return element;
}

/** Shows this text in an element, or hides the element if there is none. */
export function tell(element, text) {
  element.textContent = text ?? "";
  element.hidden = !text;
}

/** Facts as a list of definitions: pairs of a name and a text; those without a text are left out. */
export function facts(pairs) {
  const told = pairs.filter(([, text]) => text !== null && text !== undefined);
  return make("dl", { className: "facts" }, ...told.map(([name, text]) =>
    make("div", {}, make("dt", { textContent: name }), make("dd", { textContent: text }))));
}

// The page: its parts, put together, and what the server is asked for them.

import { fetched, keys } from "./api.js";
import { Charts } from "./charts.js";
import * as chat from "./chat.js";
import { get, tell } from "./dom.js";
import { Generations } from "./generations.js";
import { parse } from "./metrics.js";
import * as models from "./models.js";
import { Watch } from "./watch.js";

const charts = new Charts(get("charts"));
const generations = new Generations();

function health(state, words) {
  const shown = get("health");
  if (shown.textContent === words) return;
  shown.dataset.state = state;
  shown.textContent = words;
}

function measure(text) {
  const sample = parse(text);
  tell(get("metrics-error"), null);
  get("charts").hidden = false;
  charts.add(Date.now(), sample);
  generations.measure(sample);
}

function unmeasured(refusal) {
  tell(get("metrics-error"), `Metrics are not available: ${refusal.words}`);
  get("charts").hidden = refusal.lasts;
  if (refusal.lasts) generations.unmeasured(refusal.words);
}

const watch = new Watch([
  {
    path: "ready", form: "json", every: 1,
    show: () => health("ready", "ready"),
    refuse: refusal => health(refusal.status ? "unready" : "away", refusal.message),
  },
  { path: "metrics", form: "text", scope: "metrics", every: 1, show: measure, refuse: unmeasured },
  { path: "v1/models", form: "json", scope: "model", every: 5, show: models.show, refuse: models.refuse },
  {
    path: "admin/generations", form: "json", scope: "admin", every: 1,
    show: list => generations.list(list), refuse: refusal => generations.refuse(refusal.words),
  },
]);

chat.start();

fetched("version", "json").then(({ version }) => get("version").textContent = version, () => {});

const fields = ["key", "admin-key"].map(get);
keys.read().forEach((value, i) => fields[i].value = value);
get("keys-form").addEventListener("submit", event => {
  event.preventDefault();
  keys.keep(fields.map(({ value }) => value.trim()));
  get("keys").open = false;
  get("prompt").focus();
  watch.restart();
});

get("keys").addEventListener("keydown", event => {
  if (event.key !== "Escape") return;
  get("keys").open = false;
  get("keys").firstElementChild.focus();
});

// On narrow screens one view is shown at a time.
const views = document.querySelectorAll("nav button");
views.forEach(button => button.addEventListener("click", () => {
  document.body.dataset.view = button.dataset.view;
  views.forEach(other => other.ariaCurrent = String(other === button));
}));

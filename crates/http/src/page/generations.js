// The generations that are alive and how far each was proven. What everybody may see of them is in the metrics; admins see more.

import { fetched } from "./api.js";
import { facts, get, make, tell } from "./dom.js";
import { series, sum } from "./metrics.js";

/** What a state of the hand-off means, and how good that is. */
const HANDOFF = {
  passed: ["good", "it computes what its trainer computed"],
  pending: ["open", "it is being verified"],
  failed: ["bad", "it does not compute what its trainer computed"],
  absent: ["none", "it came without a bundle"],
  off: ["none", "nobody asks (--handoff off)"],
};

const TRAFFIC = {
  none: () => "The candidate gets no requests.",
  shadow: share => `The candidate answers ${share} of the requests unseen.`,
  share: share => `The candidate answers ${share} of the requests.`,
};

const small = value => value === null ? null : value.toLocaleString("en", { maximumSignificantDigits: 3 });
const percent = part => part === null ? null : `${small(part * 100)} %`;

/** The cards of the generations inside the page, from two sources that come when they come. */
export class Generations {
  #measured = [];
  #listed = null;
  /** Why there are none, where there are none. */
  #none = "asking";
  #shown = "";

  constructor() {
    get("handoff").addEventListener("toggle", () => {
      const serving = this.#listed?.find(({ role }) => role === "serving");
      if (get("handoff").open && serving) report(serving.names[0]);
    });
  }

  /** What the metrics say. */
  measure(sample) {
    this.#none = "None: an encoder is served, or the model is still being loaded.";
    this.#measured = (series(sample, "baton_generation_info") ?? []).map(({ labels }) => measured(sample, labels));
    this.#show();
  }

  /** What an admin is told. */
  list({ data, candidate_traffic: traffic }) {
    this.#listed = data;
    tell(get("traffic"), traffic && TRAFFIC[traffic.kind]?.(percent(traffic.share ?? 0)));
    tell(get("admin-error"), null);
    get("handoff").hidden = false;
    this.#show();
  }

  /** What an admin would be told is not told. */
  refuse(why) {
    this.#listed = null;
    tell(get("traffic"), null);
    tell(get("admin-error"), `Digests, reasons and reports are not available: ${why}`);
    get("handoff").hidden = true;
    this.#show();
  }

  /** The metrics say nothing. */
  unmeasured(why) {
    this.#measured = [];
    this.#none = `Not available: ${why}`;
    this.#show();
  }

  #show() {
    // What has not changed is left alone: somebody may be reading or copying it.
    const shown = JSON.stringify([this.#listed, this.#measured, this.#none]);
    if (shown === this.#shown) return;
    this.#shown = shown;
    const listed = this.#listed ?? [];
    const pairs = listed.map(one => [one, this.#measured.find(({ label }) => one.generation.startsWith(label))]);
    const alone = this.#measured.filter(({ label }) => !listed.some(one => one.generation.startsWith(label)));
    const cards = [...pairs, ...alone.map(one => [null, one])].map(([listed, measured]) => card(listed, measured));
    const none = make("p", { className: "note", textContent: this.#none });
    get("generations").replaceChildren(...(cards.length ? cards : [none]));
  }
}

function measured(sample, { generation: label, model_name: name, role }) {
  const own = { generation: label };
  const value = (name, more) => sum(sample, name, { ...own, ...more });
  const state = series(sample, "baton_handoff_state", own)?.find(one => one.value === 1)?.labels.state;
  // A family may be there for another generation only.
  const parity = name => series(sample, name, own)?.[0]?.value ?? null;
  return {
    label, name, role, state,
    running: value("vllm:num_requests_running"),
    waiting: value("vllm:num_requests_waiting"),
    blocks: { used: value("baton_kv_blocks", { state: "used" }), total: value("baton_kv_blocks") },
    canary: { runs: value("baton_canary_runs_total"), drifts: value("baton_canary_drift") > 0 },
    difference: parity("baton_parity_max_abs_logprob_diff"),
    agreement: parity("baton_parity_top1_agreement"),
  };
}

/** A generation as an admin sees it, as the metrics do, or both. */
function card(listed, measured) {
  const state = listed?.handoff.state ?? measured.state;
  const [how, meaning] = HANDOFF[state] ?? ["none", ""];
  const required = listed?.handoff.required ? "; it must, to serve" : "";
  const role = listed?.role ?? measured.role;
  const heading = make("h3", {},
    make("span", { className: "badge", textContent: role, data: { role } }), " ",
    listed?.names.join(", ") ?? measured.name, " ",
    make("code", { textContent: (listed?.generation ?? measured.label).slice(0, 12) }));
  const handoff = make("p", { className: "handoff" },
    "Hand-off ", make("span", { className: "badge", textContent: state, data: { how } }), ` ${meaning}${required}`);
  const reason = listed?.handoff.reason;
  const blocks = listed?.kv_blocks ?? measured.blocks;
  return make("article", { className: "card" }, heading, handoff,
    ...(reason ? [make("p", { className: "refused", textContent: reason })] : []),
    ...(listed && !listed.alive ? [make("p", { className: "refused", textContent: "its engine has stopped" })] : []),
    facts([
      ["since", listed && new Date(listed.since * 1000).toLocaleString()],
      ["requests", listed ? `${listed.requests_in_flight} in flight` : null],
      ["sequences", measured && `${measured.running} running, ${measured.waiting} waiting`],
      ["KV cache", `${blocks.used} of ${blocks.total} blocks`],
      ["off the trainer by", small(measured?.difference ?? null) && `${small(measured.difference)} nats at most`],
      ["same best token", percent(measured?.agreement ?? null)],
      ["replays", measured?.canary.runs ? `${measured.canary.runs}, ${measured.canary.drifts ? "the last one drifts" : "no drift"}` : null],
      ["fingerprint", listed?.system_fingerprint],
      ["digest", listed?.generation],
    ]));
}

/** Shows the report on the hand-off of the generation that serves a model. */
async function report(model) {
  const place = get("handoff-report");
  try {
    const { verdict, signature, checks } = await fetched(`v1/models/${encodeURIComponent(model)}/handoff`, "json", "admin");
    const rows = checks.map(({ name, verdict, details }) => make("li", {},
      make("span", { className: "badge", textContent: verdict.replace("_", " "), data: { how: HOW[verdict] ?? "none" } }),
      ` ${name.replaceAll("_", " ")}`, ...details.slice(0, 20).map(text => make("p", { className: "note", textContent: text }))));
    place.replaceChildren(facts([["verdict", verdict], ["signature", signature]]), make("ul", { className: "names" }, ...rows));
  } catch (refusal) {
    place.replaceChildren(make("p", { className: "refused", textContent: `Not available: ${refusal.words}` }));
  }
}

const HOW = { pass: "good", fail: "bad" };

// Which charts there are, and what of the metrics they show. Rates, means and quantiles are over the last ten seconds.

import { Chart } from "./chart.js";
import { increase, mean, quantile, series, sum } from "./metrics.js";

/** How far back rates and quantiles look, in milliseconds. */
const WINDOW = 10_000;

const round = (value, digits = 0) => value.toLocaleString("en", { maximumFractionDigits: digits });
const count = value => round(value, 1);
const duration = seconds =>
  seconds < 0.01 ? `${round(seconds * 1000, 1)} ms` : seconds < 1 ? `${round(seconds * 1000)} ms` : `${round(seconds, 1)} s`;
const percent = part => `${round(part * 100, 1)} %`;
const rate = name => (before, now, seconds) => {
  const grown = increase(before, now, name);
  return grown === null ? null : grown / seconds;
};
const quantiles = name => ({
  p50: (before, now) => quantile(before, now, name, 0.5),
  p95: (before, now) => quantile(before, now, name, 0.95),
});
const blocks = (...states) => (_, now) => {
  const all = sum(now, "baton_kv_blocks");
  return all ? states.reduce((part, state) => part + sum(now, "baton_kv_blocks", { state }), 0) / all : null;
};

/** Each chart, by the family that it needs, with its lines: functions of the sample at the window's begin, the one now, and the seconds between. */
const CHARTS = [
  {
    id: "chart-requests", title: "Requests", needs: "vllm:num_requests_waiting", tell: count,
    lines: {
      running: (_, now) => sum(now, "vllm:num_requests_running"),
      waiting: (_, now) => sum(now, "vllm:num_requests_waiting"),
    },
  },
  {
    id: "chart-tokens", title: "Tokens per second", needs: "vllm:prompt_tokens_total", tell: value => round(value),
    lines: { output: rate("vllm:generation_tokens_total"), prompt: rate("vllm:prompt_tokens_total") },
  },
  {
    id: "chart-cache", title: "KV cache", needs: "baton_kv_blocks", tell: percent, most: 1,
    lines: { used: blocks("used"), "+ cached": blocks("used", "cached") },
  },
  {
    id: "chart-batch", title: "Batch, tokens per step", needs: "vllm:iteration_tokens_total_count", tell: count,
    lines: {
      mean: (before, now) => mean(before, now, "vllm:iteration_tokens_total"),
      p95: (before, now) => quantile(before, now, "vllm:iteration_tokens_total", 0.95),
    },
  },
  {
    id: "chart-first", title: "Time to first token", needs: "vllm:time_to_first_token_seconds_bucket", tell: duration,
    lines: quantiles("vllm:time_to_first_token_seconds"),
  },
  {
    id: "chart-between", title: "Time between tokens", needs: "vllm:inter_token_latency_seconds_bucket", tell: duration,
    lines: quantiles("vllm:inter_token_latency_seconds"),
  },
];

/** The charts inside an element, fed with samples of the metrics. */
export class Charts {
  /** Samples of the last seconds, the oldest first, with their times. */
  #recent = [];
  #shown = [];

  constructor(element) {
    this.#shown = CHARTS.map(spec => {
      const chart = new Chart({ ...spec, lines: Object.keys(spec.lines) });
      element.append(chart.element);
      return { spec, chart };
    });
  }

  /** Shows a sample taken at this time (milliseconds). What the server does not measure has no chart. */
  add(time, now) {
    while (this.#recent.length && this.#recent[0].time < time - WINDOW) this.#recent.shift();
    const before = this.#recent[0];
    this.#recent.push({ time, sample: now });
    for (const { spec, chart } of this.#shown) {
      chart.element.hidden = series(now, spec.needs) === null;
      const seconds = before && (time - before.time) / 1000;
      chart.add(time, Object.values(spec.lines).map(line => line(before?.sample, now, seconds)));
    }
  }
}

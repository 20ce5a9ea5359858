// What /metrics says, read and compared over time. `null` stands for what is not known: a family that this server does not
// have, or a quantile of nothing.

const LABEL = /([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"/g;
const LINE = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)/;
const ESCAPED = { "\\\\": "\\", '\\"': '"', "\\n": "\n" };

/** The text format of Prometheus as a map from names to series, each with its labels, their text, and its value. */
export function parse(text) {
  const families = new Map();
  for (const line of text.split("\n")) {
    const [, name, inner = "", value] = line.match(LINE) ?? [];
    if (!name) continue;
    const pairs = [...inner.matchAll(LABEL)].map(([, label, raw]) => [label, raw.replace(/\\./g, c => ESCAPED[c] ?? c)]);
    if (!families.has(name)) families.set(name, []);
    families.get(name).push({ labels: Object.fromEntries(pairs), key: inner, value: Number(value.replace("Inf", "Infinity")) });
  }
  return families;
}

/** The series of a name that have all these labels; `null` if there is no such family. */
export function series(sample, name, labels = {}) {
  const all = sample.get(name);
  const fits = one => Object.entries(labels).every(([label, value]) => one.labels[label] === value);
  return all ? all.filter(fits) : null;
}

/** All series of a gauge together. */
export function sum(sample, name, labels) {
  return series(sample, name, labels)?.reduce((total, one) => total + one.value, 0) ?? null;
}

/** How much the series of a counter grew. One that is lower than before has begun anew. */
export function increase(before, now, name) {
  if (!before || !now.has(name)) return null;
  return now.get(name).reduce((total, one) => total + grown(before, one, name), 0);
}

function grown(before, { key, value }, name) {
  const old = before.get(name)?.find(one => one.key === key)?.value ?? 0;
  return value < old ? value : value - old;
}

/** The mean of what a histogram observed between two samples. */
export function mean(before, now, name) {
  const count = increase(before, now, `${name}_count`);
  return count ? increase(before, now, `${name}_sum`) / count : null;
}

/** A quantile of what a histogram observed between two samples, as Prometheus estimates it: evenly within a bucket. */
export function quantile(before, now, name, q) {
  const buckets = now.get(`${name}_bucket`);
  if (!before || !buckets) return null;
  const counts = new Map();
  for (const one of buckets) {
    const edge = Number(one.labels.le.replace("Inf", "Infinity"));
    counts.set(edge, (counts.get(edge) ?? 0) + grown(before, one, `${name}_bucket`));
  }
  const edges = [...counts.keys()].sort((a, b) => a - b);
  const rank = q * counts.get(edges.at(-1));
  if (!rank) return null;
  const at = edges.findIndex(edge => counts.get(edge) >= rank);
  const [low, below] = at > 0 ? [edges[at - 1], counts.get(edges[at - 1])] : [0, 0];
  // Beyond the last edge nothing is known but that.
  if (edges[at] === Infinity) return low;
  return low + (edges[at] - low) * (rank - below) / (counts.get(edges[at]) - below);
}

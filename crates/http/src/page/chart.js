// A chart: a line or two over the last minutes, and what they are now, in words.

import { make } from "./dom.js";

/** How far back a chart goes, in milliseconds. */
export const SPAN = 5 * 60 * 1000;

const [WIDTH, HEIGHT] = [300, 64];
const SVG = "http://www.w3.org/2000/svg";

function draw(tag, attributes) {
  const element = document.createElementNS(SVG, tag);
  Object.entries(attributes).forEach(([name, value]) => element.setAttribute(name, value));
  return element;
}

/** The least of 1, 2, 5, 10, … that is not below. */
function ceiling(value) {
  const decade = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map(m => m * decade).find(edge => edge >= value) ?? value;
}

/** A chart of `lines` by name. `tell` writes a value with its unit; `most`, if given, is the top of the scale. */
export class Chart {
  constructor({ id, title, lines, tell, most }) {
    Object.assign(this, { title, tell, most });
    this.lines = lines.map(name => ({ name, points: [] }));
    this.plot = draw("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" });
    this.top = make("span", { className: "most" });
    this.values = lines.map(() => make("output"));
    const legend = lines.map((name, i) => make("span", { className: "line", data: { line: i } },
      make("i", { ariaHidden: "true" }), `${name} `, this.values[i]));
    this.element = make("figure", { id, className: "chart" },
      make("figcaption", {}, make("h3", { textContent: title }), make("p", {}, ...legend)),
      make("div", { className: "plot" }, this.plot, this.top));
  }

  /** Adds what the lines are at this time (milliseconds), `null` for those of which it is not known, and draws. */
  add(time, values) {
    this.lines.forEach(({ points }, i) => {
      points.push([time, values[i]]);
      while (points[0][0] < time - SPAN) points.shift();
      this.values[i].value = values[i] === null ? "–" : this.tell(values[i]);
    });
    this.#paint(time);
  }

  #paint(now) {
    const known = this.lines.flatMap(line => line.points.map(([, value]) => value)).filter(value => value !== null);
    const most = this.most ?? ceiling(Math.max(0, ...known) || 1);
    this.top.textContent = known.length ? this.tell(most) : "";
    const x = time => WIDTH * (1 - (now - time) / SPAN);
    const y = value => HEIGHT - 1 - (HEIGHT - 2) * Math.min(value / most, 1);
    const paths = this.lines.flatMap(({ points }, line) => runs(points).flatMap(run => {
      const path = run.map(([time, value]) => `${x(time).toFixed(1)},${y(value).toFixed(1)}`).join("L");
      const [first, last] = [x(run[0][0]).toFixed(1), x(run.at(-1)[0]).toFixed(1)];
      // A run of one point is a dot.
      const stroke = draw("path", { d: `M${path}h0.01`, class: "stroke", "data-line": line });
      const area = draw("path", { d: `M${first},${HEIGHT}L${path}L${last},${HEIGHT}Z`, class: "area", "data-line": line });
      return line === 0 ? [area, stroke] : [stroke];
    }));
    this.plot.replaceChildren(...paths);
    const said = this.lines.map(({ name }, i) => `${name} ${this.values[i].value.replace("–", "nothing")}`);
    this.plot.setAttribute("aria-label", `${this.title} over the last 5 minutes; now ${said.join(", ")}`);
  }
}

/** Points that follow each other without one that is not known, or a pause, between. */
function runs(points) {
  const all = [];
  let last = null;
  for (const point of points) {
    if (point[1] === null) { last = null; continue; }
    if (!last || point[0] - last[0] > PAUSE) all.push([]);
    all.at(-1).push(point);
    last = point;
  }
  return all;
}

/** Points farther apart are not joined: nobody looked in between. In milliseconds. */
const PAUSE = 10_000;

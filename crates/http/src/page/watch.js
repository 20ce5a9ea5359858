// Asking the server again and again, while somebody looks.

import { fetched } from "./api.js";

/** Milliseconds between two rounds. */
const PAUSE = 2000;

/**
 * Sources are asked at the same time, again after a pause, and not at all while the page is hidden. A source is a `path`, the
 * `form` of its replies and the `scope` of its keys; it is asked once in `every` rounds, and told to `show` a reply or to
 * `refuse` with a refusal. After one that lasts it is asked no more until the keys change, after another one in every round.
 */
export class Watch {
  #sources;
  #round = 0;
  #timer = null;

  constructor(sources) {
    this.#sources = sources;
    document.addEventListener("visibilitychange", () => this.#next(0));
    this.restart();
  }

  /** Asks all sources anew: the keys are others. */
  restart() {
    this.#sources.forEach(source => Object.assign(source, { due: true, refused: false }));
    this.#next(0);
  }

  #next(pause) {
    clearTimeout(this.#timer);
    if (!document.hidden) this.#timer = setTimeout(() => this.#ask(), pause);
  }

  async #ask() {
    const [round, timer] = [this.#round++, this.#timer];
    const is_due = ({ due, refused, every }) => due || (!refused && round % every === 0);
    await Promise.all(this.#sources.filter(is_due).map(async source => {
      source.due = false;
      const [show, value] = await fetched(source.path, source.form, source.scope)
        .then(value => [source.show, value], refusal => [source.refuse, refusal]);
      // What was asked with other keys is nobody's business.
      if (timer !== this.#timer) return;
      const failed = show === source.refuse;
      source.refused = failed && value.lasts;
      source.due = failed && !value.lasts;
      show(value);
    }));
    if (timer === this.#timer) this.#next(PAUSE);
  }
}

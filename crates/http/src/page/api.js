// Calls of the server's API, as any client makes them. Whatever does not go well is a Refusal, in the server's own words.

/** Why a call did not go well. `status` is 0 if there was no reply. */
export class Refusal extends Error {
  constructor(status, { message, code = null, param = null }, retryAfter = null) {
    super(message);
    Object.assign(this, { status, code, param, retryAfter });
  }

  /** The same call with the same keys will not go better later. */
  get lasts() {
    return [401, 403, 404].includes(this.status);
  }

  /** In words. */
  get words() {
    const about = [this.code, this.param && `parameter ${this.param}`].filter(Boolean).join(", ");
    const later = this.retryAfter ? `; try again in ${this.retryAfter} s` : "";
    const status = this.status && this.status !== 200 ? `${this.status}: ` : "";
    return `${status}${this.message}${later}${about ? ` (${about})` : ""}`;
  }
}

const KEYS = ["api-key", "admin-key"];
// Where nothing may be stored they last as long as the page.
let kept = KEYS.map(() => "");

/** The keys of this tab: of the model's users, and of admins. */
export const keys = {
  read: () => {
    try {
      return KEYS.map(name => sessionStorage.getItem(name) ?? "");
    } catch {
      return kept;
    }
  },
  keep: values => {
    kept = values;
    try {
      KEYS.forEach((name, i) => sessionStorage.setItem(name, values[i]));
    } catch {
      // They are kept above.
    }
  },
};

/** Who may make a call: for each, the keys to try, the likelier first. */
const TRIED = {
  model: ([key]) => [key],
  admin: ([key, admin]) => [admin, key],
  metrics: ([key, admin]) => [key, admin],
};

/** The reply to a call, if it is a good one. Throws a Refusal, or what `signal` was aborted with. */
export async function call(path, { scope = "model", body, signal } = {}) {
  const tried = [...new Set(TRIED[scope](keys.read()).filter(Boolean))];
  // Nobody is an admin without a key; asking would only fill the log.
  if (scope === "admin" && !tried.length) throw new Refusal(401, { message: "an admin key is needed: enter it under Keys" });
  let refusal;
  for (const key of tried.length ? tried : [null]) {
    const reply = await send(path, key, body, signal);
    if (reply.ok) return reply;
    refusal = await read(reply);
    if (![401, 403].includes(refusal.status)) break;
  }
  throw refusal;
}

/** The body of such a reply, as "json" or "text". Throws nothing but a Refusal; a server that does not answer in time is one. */
export async function fetched(path, form, scope) {
  try {
    return await (await call(path, { scope, signal: AbortSignal.timeout(PATIENCE) }))[form]();
  } catch (error) {
    if (error instanceof Refusal) throw error;
    throw new Refusal(0, { message: "the server does not answer, or not as it should", code: "unreadable" });
  }
}

/** Milliseconds that something small may take. */
const PATIENCE = 10_000;

async function send(path, key, body, signal) {
  const headers = {};
  if (key) headers.authorization = `Bearer ${key}`;
  if (body) headers["content-type"] = "application/json";
  const method = body ? "POST" : "GET";
  try {
    // Relative to the page, which a gateway may have put under a path of its own.
    const url = new URL(path, document.baseURI);
    return await fetch(url, { method, headers, body: body && JSON.stringify(body), signal, cache: "no-store" });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Refusal(0, { message: "the server cannot be reached", code: "unreachable" });
  }
}

async function read(reply) {
  const after = reply.headers.get("retry-after");
  try {
    return new Refusal(reply.status, (await reply.json()).error, after);
  } catch {
    return new Refusal(reply.status, { message: "a reply that is not the server's" }, after);
  }
}

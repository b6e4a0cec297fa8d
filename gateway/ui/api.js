// Calls of the admin port. The key is in the memory of this tab (sessionStorage) and in a header; there are no cookies.

const STORED_KEY = "quantgate admin key";
const STALLED_MS = 6000;
const FIRST_RETRY_MS = 500;
const LAST_RETRY_MS = 5000;

export class KeyNeeded extends Error {}

export const storedKey = () => sessionStorage.getItem(STORED_KEY);
export const storeKey = (key) => sessionStorage.setItem(STORED_KEY, key);

export async function call(path, options = {}) {
  const headers = { ...options.headers };
  if (storedKey()) headers.authorization = `Bearer ${storedKey()}`;
  const answer = await fetch(`../admin/${path}`, {
    ...options,
    headers,
    cache: "no-store",
    credentials: "omit",
    redirect: "error",
  });
  if (answer.status === 401 && !answer.headers.get("x-request-id")) throw new KeyNeeded();
  return answer;
}

export async function problemOf(answer) {
  const text = await answer.text();
  try {
    const body = JSON.parse(text);
    return body.error?.message ?? (typeof body.detail === "string" ? body.detail : text);
  } catch {
    return text || `status ${answer.status}`;
  }
}

export const post = (path, body, options = {}) =>
  call(path, {
    ...options,
    method: "POST",
    body: JSON.stringify(body),
    headers: { ...options.headers, "content-type": "application/json" },
  });

// The events of a stream: {event, data}.
export async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const lines = part.split("\n");
      const field = (name) =>
        lines.filter((line) => line.startsWith(`${name}:`)).map((line) => line.slice(name.length + 1).trimStart());
      yield { event: field("event")[0] ?? "message", data: field("data").join("\n") };
    }
  }
}

// Follows /admin/status/stream for as long as the page is visible, through restarts of the gateway.
export class StatusStream {
  constructor({ onStatus, onState, onKeyNeeded }) {
    Object.assign(this, { onStatus, onState, onKeyNeeded });
    this.abort = null;
    this.retryMs = FIRST_RETRY_MS;
    this.timer = 0;
    document.addEventListener("visibilitychange", () => (document.hidden ? this.stop() : this.start()));
  }

  start() {
    this.stop();
    this.abort = new AbortController();
    this.follow(this.abort);
  }

  stop() {
    this.abort?.abort();
    this.abort = null;
    clearTimeout(this.timer);
  }

  async follow(abort) {
    let why = "no connection";
    try {
      why = await this.read(abort);
    } catch (error) {
      if (error instanceof KeyNeeded && this.abort === abort) {
        this.onState("bad", "key needed");
        this.onKeyNeeded();
        return;
      }
    }
    if (this.abort !== abort) return;
    abort.abort();
    this.onState("bad", `${why}, retrying`);
    this.timer = setTimeout(() => this.start(), this.retryMs);
    this.retryMs = Math.min(2 * this.retryMs, LAST_RETRY_MS);
  }

  // Returns why the stream ended.
  async read(abort) {
    let watch = setTimeout(() => abort.abort(), STALLED_MS);
    try {
      const answer = await call("status/stream", { signal: abort.signal });
      if (!answer.ok) return answer.status === 503 ? "gateway stops" : `status ${answer.status}`;
      for await (const { event, data } of events(answer)) {
        clearTimeout(watch);
        watch = setTimeout(() => abort.abort(), STALLED_MS);
        if (event === "end") return "gateway stops";
        this.retryMs = FIRST_RETRY_MS;
        this.onState("ok", "live");
        this.onStatus(JSON.parse(data));
      }
      return "no connection";
    } finally {
      clearTimeout(watch);
    }
  }
}

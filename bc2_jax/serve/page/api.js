// The server as the page sees it: settings, health, one streamed answer.

import { readEvents } from "./stream.js";

const PATIENCE = 5; // times a busy server is asked again

/** kind: gone (nothing answered), cut (the stream broke), key, busy (429, 503), answer (not JSON), refused (the
 * server's own sentence is `message`). */
export class ServerError extends Error {
  constructor(kind, message = "", { status = 0, wait = 0, code = null } = {}) {
    super(message);
    Object.assign(this, { kind, status, wait, code });
  }
}

async function refusal(response) {
  let error = null;
  try {
    error = (await response.json()).error;
  } catch {
    // a proxy's page, or the connection broke
  }
  const { status } = response;
  const wait = Math.min(120, Math.max(1, parseInt(response.headers.get("Retry-After"), 10) || 2));
  const text = typeof error?.message === "string" ? error.message : "";
  if (status === 401) return new ServerError("key", text, { status });
  if (status === 429 || status === 503) return new ServerError("busy", text, { status, wait });
  return new ServerError(text ? "refused" : "answer", text, { status, code: error?.code ?? null });
}

function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    const stop = () => {
      clearTimeout(timer);
      reject(signal.reason);
    };
    const timer = setTimeout(() => {
      signal.removeEventListener("abort", stop);
      resolve();
    }, seconds * 1000);
    signal.addEventListener("abort", stop, { once: true });
  });
}

export class Server {
  /** `askKey(wasWrong)` -> a key, or null if the user has none. `onGone()` is called when nothing answers. */
  constructor({ key, askKey, onGone }) {
    Object.assign(this, { key, onGone, settings: null });
    let asking = null; // one dialog, whoever needs the key
    this.askKey = (wasWrong) => (asking ??= askKey(wasWrong).finally(() => (asking = null)));
  }

  async fetch(path, options = {}) {
    for (;;) {
      const headers = { ...options.headers };
      const key = this.key;
      if (key) headers.Authorization = `Bearer ${key}`;
      let response;
      try {
        response = await fetch(path, { ...options, headers });
      } catch (error) {
        if (options.signal?.aborted) throw error;
        this.onGone();
        throw new ServerError("gone");
      }
      if (response.ok) return response;
      const error = await refusal(response);
      if (error.kind !== "key") throw error;
      if (this.key === key) this.key = await this.askKey(Boolean(key)); // else another request has asked meanwhile
      if (!this.key) throw error;
    }
  }

  async loadSettings() {
    const response = await this.fetch("settings");
    try {
      this.settings = await response.json();
    } catch {
      throw new ServerError("answer", "", { status: response.status });
    }
    return this.settings;
  }

  /** "ready", "loading", "draining" or "dead" as the server says, "gone" if nothing answers. */
  async health() {
    try {
      const response = await fetch("health", { cache: "no-store" });
      const { status } = await response.json();
      return ["ready", "loading", "draining", "dead"].includes(status) ? status : "gone";
    } catch {
      return "gone";
    }
  }

  /** Streams an answer. `show` gets the parts as they come: {phase, ahead, seconds}, {dropped}, {seed}, {text},
   * {finish}, {usage}. Returns at [DONE]; throws ServerError, or the signal's reason if `signal` aborts. */
  async answer(body, signal, show) {
    show({ phase: "connecting" });
    const response = await this.request(body, signal, show);
    const dropped = parseInt(response.headers.get("X-Dropped-Rounds"), 10);
    if (dropped > 0) show({ dropped });
    try {
      for await (const event of readEvents(response.body)) {
        if (event.comment !== undefined) showComment(event.comment, show);
        else if (event.data === "[DONE]") return;
        else showChunk(event.data, show);
      }
    } catch (error) {
      if (signal.aborted || error instanceof ServerError) throw error;
      this.onGone();
      throw new ServerError("cut");
    }
    throw new ServerError("cut");
  }

  async request(body, signal, show) {
    const options = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal };
    for (let tries = 0; ; tries++) {
      try {
        return await this.fetch("v1/chat/completions", options);
      } catch (error) {
        if (error.kind !== "busy" || tries === PATIENCE) throw error;
        for (let seconds = error.wait; seconds > 0; seconds--) {
          show({ phase: "busy", seconds });
          await pause(1, signal);
        }
        show({ phase: "connecting" });
      }
    }
  }
}

function showComment(comment, show) {
  const [word, number] = comment.split(" ");
  if (word === "queued") show({ phase: "queued", ahead: parseInt(number, 10) || 0 });
  else if (word === "prefill") show({ phase: "prefill" });
}

function showChunk(data, show) {
  let chunk;
  try {
    chunk = JSON.parse(data);
  } catch {
    throw new ServerError("answer", "", { status: 200 });
  }
  if (chunk.error) throw new ServerError("refused", String(chunk.error.message ?? ""), { code: chunk.error.code });
  if (Number.isInteger(chunk.seed)) show({ seed: chunk.seed });
  const choice = chunk.choices?.[0];
  if (choice?.delta?.content) show({ text: choice.delta.content });
  if (choice?.finish_reason) show({ finish: choice.finish_reason });
  if (chunk.usage) show({ usage: chunk.usage });
}

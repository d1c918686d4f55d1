// Answers being written: at most one in each conversation, whichever is on the screen.

import { requestMessages, versions } from "./conversation.js";
import { ServerError } from "./api.js";

const SAVE_EVERY = 1000; // ms between saves while an answer grows

export class Generations {
  /** `changed(conversation, message)` after every part; `ended(conversation, message)` after the last. */
  constructor(server, store, { changed, ended }) {
    Object.assign(this, { server, store, changed, ended });
    this.left = false;
    this.running = new Map(); // id of a conversation -> {controller, conversation, message}
  }

  of(conversation) {
    return this.running.get(conversation?.id) ?? null;
  }

  stop(conversation) {
    this.of(conversation)?.controller.abort();
  }

  /** The page is being closed: that breaks the connections, and is no fault of the server. */
  leave() {
    this.left = true;
    for (const { conversation } of this.running.values()) this.store.save(conversation);
  }

  /** Writes the answer `message`, a leaf of `conversation`. One that has text already is continued. */
  async write(conversation, message, sampler) {
    if (this.of(conversation)) return;
    const controller = new AbortController();
    this.running.set(conversation.id, { controller, conversation, message });
    for (const name of ["error", "usage", "rate", "seed", "dropped"]) delete message[name];
    Object.assign(message, { status: "running", phase: "connecting" });
    try {
      await this.stream(conversation, message, sampler, controller.signal);
    } catch (error) {
      if (controller.signal.aborted) message.status = "stopped";
      else if (this.left) message.status = "interrupted";
      else if (error instanceof ServerError) setError(message, error);
      else throw error;
    } finally {
      if (message.status === "running") message.status = "interrupted"; // a fault of this page
      for (const name of ["phase", "ahead", "seconds"]) delete message[name];
      this.running.delete(conversation.id);
      conversation.changed = Date.now();
      this.store.save(conversation);
      this.ended(conversation, message);
    }
  }

  async stream(conversation, message, sampler, signal) {
    const settings = this.server.settings ?? (await this.server.loadSettings());
    const leaf = message.content ? message.id : message.parent;
    const { messages, omitted } = requestMessages(conversation, leaf, settings.limits);
    const seed = message.content ? {} : seedOf(conversation, message, sampler);
    const body = { messages, stream: true, stream_options: { include_usage: true }, ...sampler, ...seed };
    if (omitted) message.dropped = omitted;
    let [saved, first, finish] = [Date.now(), 0, "stop"];
    const show = (part) => {
      if (part.phase) Object.assign(message, { ahead: 0, seconds: 0 }, part);
      if (part.dropped) message.dropped = omitted + part.dropped;
      if (part.seed !== undefined) message.seed = part.seed;
      if (part.text) {
        first ||= performance.now();
        message.phase = "writing";
        message.content += part.text;
      }
      if (part.finish) finish = part.finish;
      if (part.usage) {
        message.usage = part.usage;
        const seconds = (performance.now() - first) / 1000;
        if (first && seconds > 0.1) message.rate = part.usage.completion_tokens / seconds;
      }
      if (Date.now() - saved > SAVE_EVERY) {
        this.store.save(conversation);
        saved = Date.now();
      }
      this.changed(conversation, message);
    };
    this.store.save(conversation);
    await this.server.answer(body, signal, show);
    message.status = finish === "length" ? "length" : "done";
  }
}

/** A fixed seed would give the same answer again: each further version takes the next one. */
function seedOf(conversation, message, { seed }) {
  if (seed === undefined) return {};
  const place = versions(conversation, message).findIndex((other) => other.id === message.id);
  return { seed: (seed + place) % 2 ** 32 };
}

function setError(message, { kind, message: text, status }) {
  message.status = "error";
  message.error = { kind, message: text, status };
}

/** After a reload nothing is being written any more. */
export function settle(conversation) {
  for (const message of Object.values(conversation.messages)) {
    if (message.status === "running") message.status = "interrupted";
  }
  return conversation;
}

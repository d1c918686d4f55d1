// Conversations and settings in the browser's localStorage, one key each; in memory where that is full or blocked.

const PREFIX = "bc2.";
const CHAT = `${PREFIX}chat.`;

export class Store {
  /** `onFull(isFull)` is called when something can no longer be kept, and when it can again. */
  constructor(storage, onFull = () => {}) {
    this.storage = storage;
    this.onFull = onFull;
    this.unsaved = new Map(); // key -> text that storage did not take
    this.isFull = false;
    this.deleted = new Set(); // ids of conversations: an answer that ends later must not bring one back
  }

  read(key) {
    try {
      const text = this.unsaved.get(key) ?? this.storage.getItem(key);
      return text === null ? null : JSON.parse(text);
    } catch {
      return null; // blocked, or not ours: left as it is
    }
  }

  write(key, value) {
    const text = JSON.stringify(value);
    this.unsaved.set(key, text);
    this.flush();
  }

  /** Writes what is not written yet, as far as there is room. */
  flush() {
    for (const [key, text] of [...this.unsaved]) {
      try {
        this.storage.setItem(key, text);
        this.unsaved.delete(key);
      } catch {
        // full or blocked: kept in memory
      }
    }
    if (this.isFull !== this.unsaved.size > 0) this.onFull((this.isFull = !this.isFull));
  }

  remove(key) {
    this.unsaved.delete(key);
    try {
      this.storage.removeItem(key);
    } catch {
      // blocked: there is nothing to remove
    }
    this.flush();
  }

  keys() {
    const keys = new Set(this.unsaved.keys());
    try {
      for (let i = 0; i < this.storage.length; i++) keys.add(this.storage.key(i));
    } catch {
      // blocked
    }
    return [...keys];
  }

  conversation(id) {
    const found = this.read(CHAT + id);
    return isConversation(found, id) ? found : null;
  }

  /** All conversations, the one that changed last first. */
  conversations() {
    const ids = this.keys().filter((key) => key.startsWith(CHAT)).map((key) => key.slice(CHAT.length));
    const found = ids.map((id) => this.conversation(id)).filter(Boolean);
    return found.sort((a, b) => b.changed - a.changed);
  }

  save(conversation) {
    if (!this.deleted.has(conversation.id)) this.write(CHAT + conversation.id, conversation);
  }

  delete(id) {
    this.deleted.add(id);
    this.remove(CHAT + id);
  }

  restore(conversation) {
    this.deleted.delete(conversation.id);
    this.save(conversation);
  }

  setting(name) {
    return this.read(PREFIX + name);
  }

  set(name, value) {
    if (value === null) this.remove(PREFIX + name);
    else this.write(PREFIX + name, value);
  }

  /** Calls `callback(id)` when another tab changed the conversation `id`. */
  watch(callback) {
    addEventListener("storage", (event) => {
      if (event.key?.startsWith(CHAT)) callback(event.key.slice(CHAT.length));
    });
  }
}

/** Storage is the user's to edit and an older page's to have written: what does not fit is not shown. */
function isConversation(value, id) {
  if (value?.id !== id || typeof value.title !== "string" || typeof value.system !== "string") return false;
  if (typeof value.changed !== "number" || typeof value.messages !== "object" || value.messages === null) return false;
  const seen = new Set(); // parents come before their children, so there is no circle
  return Object.entries(value.messages).every(([key, message]) => {
    const fits =
      message?.id === key &&
      (message.parent === null || seen.has(message.parent)) &&
      (message.role === "user" || message.role === "assistant") &&
      typeof message.content === "string";
    seen.add(key);
    return fits;
  });
}

/** localStorage, or what behaves like one that keeps nothing: reading the property alone may throw. */
export function browserStorage() {
  try {
    return window.localStorage;
  } catch {
    const refuse = () => {
      throw new Error("blocked");
    };
    return { getItem: () => null, setItem: refuse, removeItem: () => {}, key: () => null, length: 0 };
  }
}

// A conversation as a tree of messages: editing and regenerating add a sibling, so nothing that was said is lost.
//
// {id, title, created, changed, system, messages: {id: {id, parent, role, content, ...}}, leaf: id of the last shown}

/** Random id. (crypto.randomUUID exists only where the page came over https or from this machine.) */
export function randomId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export function makeConversation(system = "") {
  const now = Date.now();
  return { id: randomId(), title: "", created: now, changed: now, system, messages: {}, leaf: null };
}

/** Adds a message below `parent` (null: it is a first one) and shows the branch it ends. */
export function addMessage(conversation, parent, role, content) {
  const message = { id: randomId(), parent, role, content };
  conversation.messages[message.id] = message;
  conversation.leaf = message.id;
  conversation.changed = Date.now();
  if (!conversation.title && role === "user") conversation.title = titleOf(content);
  return message;
}

export const titleOf = (text) => Array.from(text.trim().replace(/\s+/g, " ")).slice(0, 60).join("");

/** The messages from the first to `leaf`. */
export function branch(conversation, leaf = conversation.leaf) {
  const messages = [];
  for (let message = conversation.messages[leaf]; message; message = conversation.messages[message.parent]) {
    messages.push(message);
  }
  return messages.reverse();
}

/** All versions of a message, in the order they were made. */
export function versions(conversation, message) {
  return Object.values(conversation.messages).filter((other) => other.parent === message.parent);
}

/** Shows the branch through `message`: its newest children, down to a leaf. */
export function showVersion(conversation, message) {
  let leaf = message;
  for (;;) {
    const children = Object.values(conversation.messages).filter((other) => other.parent === leaf.id);
    if (!children.length) break;
    leaf = children.at(-1);
  }
  conversation.leaf = leaf.id;
}

/** What the server is asked: system text, then the branch up to `leaf`; empty answers, of failed requests, left out
 * with their questions. `limits` are the server's; `omitted` counts rounds that are too old for these. */
export function requestMessages(conversation, leaf, limits) {
  const rounds = [];
  for (const { role, content } of branch(conversation, leaf)) {
    if (role === "user") rounds.push([{ role, content }]);
    else if (content) rounds.at(-1).push({ role, content });
  }
  const kept = rounds.filter((round, number) => round.length === 2 || number === rounds.length - 1);
  const system = conversation.system.trim() ? [{ role: "system", content: conversation.system }] : [];
  const bytes = (messages) => new TextEncoder().encode(JSON.stringify(messages)).length;
  let room = limits.body_bytes - bytes(system) - 4096; // for the sampler's fields
  let places = limits.messages - system.length;
  let first = kept.length;
  while (first > 0) {
    room -= bytes(kept[first - 1]);
    places -= kept[first - 1].length;
    if ((room < 0 || places < 0) && first < kept.length) break;
    first--;
  }
  return { messages: [...system, ...kept.slice(first).flat()], omitted: first };
}

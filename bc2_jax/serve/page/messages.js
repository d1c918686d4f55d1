// One message on the screen: its text, its state, what can be done with it.

import { copyButton, growWithText, icon, iconButton, isComposing, make } from "./dom.js";
import { label } from "./labels.js";
import { MarkdownView } from "./markdown.js";

const codeTools = (code) => [copyButton("copyCode", () => code.textContent)];

/** The element of a user's message. `actions`: edit(message, text), show(message), as the page defines them. */
export function userView(message, siblings, actions) {
  const body = make("div", { className: "body", dir: "auto" }, message.content); // as it was typed: no Markdown
  const tools = make("div", { className: "tools" }, ...versionTools(message, siblings, actions));
  const element = make("article", { className: "message user" }, body, tools);
  element.dataset.id = message.id;
  const edit = iconButton("edit", "edit", () => openEditor(element, message, actions));
  edit.classList.add("idle");
  tools.append(copyButton("copy", () => message.content), edit);
  nameMessage(element, "you");
  return element;
}

function nameMessage(element, name) {
  element.dataset.name = name;
  element.setAttribute("aria-label", label(name));
}

/** ‹ 2/3 › where a message has several versions. */
function versionTools(message, siblings, actions) {
  if (siblings.length < 2) return [];
  const at = siblings.findIndex((other) => other.id === message.id);
  const step = (name, hint, to) => {
    const button = iconButton(name, hint, () => actions.show(siblings[to]));
    button.classList.add("idle");
    button.disabled = to < 0 || to >= siblings.length;
    return button;
  };
  const place = make("span", { className: "place", textContent: `${at + 1}/${siblings.length}` });
  return [step("left", "previous", at - 1), place, step("right", "next", at + 1)];
}

function openEditor(element, message, actions) {
  const area = make("textarea", { value: message.content, rows: 1, dir: "auto" });
  area.setAttribute("aria-label", label("edit"));
  const close = () => {
    editor.replaceWith(...hidden);
    element.classList.remove("editing");
    element.querySelector(".tools .idle:last-child").focus();
  };
  const send = () => {
    if (area.value.trim()) actions.edit(message, area.value);
  };
  const cancel = make("button", { type: "button", className: "plain", textContent: label("cancel") });
  const done = make("button", { type: "button", className: "primary", textContent: label("send") });
  cancel.addEventListener("click", close);
  done.addEventListener("click", send);
  area.addEventListener("keydown", (event) => {
    if (isComposing(event)) return;
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      send();
    } else if (event.key === "Escape") {
      event.stopPropagation();
      close();
    }
  });
  const hidden = [...element.children];
  const editor = make("div", { className: "editor" }, area, make("div", { className: "buttons" }, cancel, done));
  element.replaceChildren(editor);
  element.classList.add("editing");
  growWithText(area)();
  area.focus();
}

/** An answer; `update` shows what changed of its message while it is written. */
export class AnswerView {
  /** `actions`: regenerate(message), resume(message), show(message). */
  constructor(message, siblings, actions) {
    this.message = message;
    this.notice = make("p", { className: "notice", hidden: true });
    this.body = make("div", { className: "body markdown", dir: "auto" });
    this.markdown = new MarkdownView(this.body, codeTools);
    this.state = make("p", { className: "state" });
    this.figures = make("span", { className: "figures" });
    const resume = this.idle("continue", () => actions.resume(message));
    const again = this.idle("regenerate", () => actions.regenerate(message));
    this.resume = resume;
    this.tools = make(
      "div", { className: "tools" },
      ...versionTools(message, siblings, actions), copyButton("copy", () => message.content), again, resume, this.figures,
    );
    this.retry = make("button", { type: "button", className: "plain retry" }, icon("regenerate"), make("span"));
    this.retry.addEventListener("click", () => (message.content ? actions.resume(message) : actions.regenerate(message)));
    this.element = make("article", { className: "message assistant" }, this.notice, this.body, this.state, this.tools);
    this.element.dataset.id = message.id;
    nameMessage(this.element, "model");
    this.update();
  }

  idle(name, action) {
    const button = iconButton(name, name, action);
    button.classList.add("idle");
    return button;
  }

  update() {
    const { message } = this;
    const running = message.status === "running";
    this.markdown.update(message.content);
    this.element.classList.toggle("running", running);
    this.element.classList.toggle("writing", running && message.phase === "writing");
    this.element.setAttribute("aria-busy", String(running));
    this.notice.hidden = !message.dropped;
    if (message.dropped) this.notice.textContent = droppedText(message.dropped);
    const text = stateText(message);
    this.state.hidden = !text;
    this.state.classList.toggle("error", message.status === "error");
    if (this.state.dataset.text !== text) {
      this.state.dataset.text = text;
      this.state.replaceChildren(text);
      if (message.status === "error") {
        this.retry.lastChild.textContent = label(message.content ? "continue" : "retry");
        this.state.append(this.retry);
      }
    }
    this.resume.hidden = !message.content || !["stopped", "length", "interrupted"].includes(message.status);
    this.tools.hidden = running;
    this.figures.textContent = figuresText(message);
    this.figures.title = detailsText(message);
  }
}

const droppedText = (count) =>
  label("dropped", { rounds: count === 1 ? label("round") : label("rounds", { count }) });

/** What a message's state is called, in the page's language; "" for one that is complete. */
export function stateText(message) {
  const { status, phase } = message;
  if (status === "running") {
    if (phase === "queued") return message.ahead ? label("queued", { ahead: message.ahead }) : label("queuedNext");
    return label(phase, { seconds: message.seconds });
  }
  if (status === "error") return errorText(message.error);
  if (status === "done") return message.content ? "" : label("empty");
  return label(status);
}

/** What went wrong, in the server's words if it said anything. */
export function errorText({ kind, message, status }) {
  if (kind === "refused" && message) return message;
  const names = { gone: "errorGone", cut: "errorCut", key: "errorKey", busy: "errorBusy" };
  return label(names[kind] ?? "errorAnswer", { status });
}

function figuresText({ usage, rate }) {
  if (!usage) return "";
  const texts = [label("tokens", { count: usage.completion_tokens })];
  if (rate) texts.push(label("speed", { rate: rate < 10 ? rate.toFixed(1) : Math.round(rate) }));
  return texts.join(" · ");
}

function detailsText({ usage, seed }) {
  if (!usage) return "";
  const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
  return label("details", { prompt: usage.prompt_tokens, cached, seed });
}

// The list of conversations: open, rename, delete.

import { iconButton, isComposing, make, toast } from "./dom.js";
import { label } from "./labels.js";

export class Sidebar {
  /** `actions`: open(id), rename(id, title), remove(id) -> a function that undoes it. */
  constructor(element, actions) {
    this.element = element;
    this.list = element.querySelector("#chats");
    this.actions = actions;
    this.shade = document.getElementById("shade");
    this.menu = document.getElementById("menu");
    this.menu.addEventListener("click", () => this.toggle(!this.isOpen()));
    this.shade.addEventListener("click", () => this.toggle(false));
    element.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || !this.isOpen()) return;
      event.stopPropagation();
      this.toggle(false);
      this.menu.focus();
    });
    this.narrow = matchMedia("(max-width: 760px)");
    this.narrow.addEventListener("change", () => this.toggle(false));
    this.toggle(false);
  }

  isOpen() {
    return this.element.classList.contains("open");
  }

  /** On a narrow screen the list lies over the conversation, or is out of reach of mouse and keyboard. */
  toggle(open) {
    this.element.classList.toggle("open", open);
    this.element.inert = this.narrow.matches && !open;
    this.shade.hidden = !open;
    this.menu.setAttribute("aria-expanded", String(open));
    if (open) this.element.querySelector("button").focus();
  }

  /** `running`: ids of conversations in which an answer is being written. */
  show(conversations, currentId, running) {
    if (this.list.querySelector("input")) return; // a title is being edited
    const focused = document.activeElement?.closest?.("#chats li")?.dataset.id;
    const items = conversations.map((conversation) => this.item(conversation, currentId, running));
    this.list.replaceChildren(...items);
    if (!items.length) this.list.append(make("li", { className: "none", textContent: label("noChats") }));
    if (focused) this.list.querySelector(`li[data-id="${CSS.escape(focused)}"] .title`)?.focus();
  }

  item(conversation, currentId, running) {
    const { id } = conversation;
    const title = conversation.title || label("untitled");
    const open = make("button", { type: "button", className: "title", textContent: title, title });
    const current = id === currentId;
    if (current) open.setAttribute("aria-current", "page");
    open.addEventListener("click", () => {
      this.actions.open(id);
      this.toggle(false);
    });
    const rename = iconButton("edit", "rename", () => this.editTitle(item, conversation));
    const remove = iconButton("delete", "delete", () => {
      const undo = this.actions.remove(id);
      toast(label("deleted", { title }), label("undo"), undo);
    });
    const item = make("li", { className: current ? "current" : "" }, open, rename, remove);
    item.dataset.id = id;
    item.classList.toggle("running", running.has(id));
    return item;
  }

  editTitle(item, conversation) {
    const input = make("input", { type: "text", value: conversation.title, maxLength: 200 });
    input.setAttribute("aria-label", label("rename"));
    let over = false; // taking the field away makes it lose focus, too
    const end = (keep) => {
      if (over) return;
      over = true;
      const title = input.value.trim();
      input.remove();
      this.actions.rename(conversation.id, keep && title ? title : conversation.title);
    };
    input.addEventListener("keydown", (event) => {
      if (isComposing(event)) return;
      if (event.key === "Enter") end(true);
      if (event.key === "Escape") {
        event.stopPropagation();
        end(false);
      }
    });
    input.addEventListener("blur", () => end(true));
    item.replaceChildren(input);
    input.focus();
    input.select();
  }
}

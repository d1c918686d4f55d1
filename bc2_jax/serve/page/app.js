// The chat page: puts its parts together.

import { Server, ServerError } from "./api.js";
import { addMessage, branch, makeConversation, showVersion, titleOf, versions } from "./conversation.js";
import { announce, EndKeeper, growWithText, isComposing } from "./dom.js";
import { Generations, settle } from "./generation.js";
import { applyLabels, label, language, setLanguage } from "./labels.js";
import { AnswerView, errorText, stateText, userView } from "./messages.js";
import { askKey, SettingsDrawer } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { browserStorage, Store } from "./store.js";

const get = (id) => document.getElementById(id);

class Page {
  constructor() {
    this.store = new Store(browserStorage(), (isFull) => (get("full").hidden = !isFull));
    setLanguage(this.store.setting("language"));
    this.server = new Server({
      key: this.savedKey(),
      askKey: (wasWrong) => askKey(get("key-dialog"), wasWrong, (key, keep) => this.keepKey(key, keep)),
      onGone: () => this.watchServer("gone"),
    });
    this.generations = new Generations(this.server, this.store, {
      changed: (conversation) => this.onChanged(conversation),
      ended: (conversation, message) => this.onEnded(conversation, message),
    });
    this.drawer = new SettingsDrawer(get("settings"), this.store, (text) => this.setSystem(text));
    this.sidebar = new Sidebar(get("sidebar"), {
      open: (id) => this.open(id),
      rename: (id, title) => this.rename(id, title),
      remove: (id) => this.remove(id),
    });
    this.keeper = new EndKeeper(get("scroll"), get("log"), get("to-end"));
    this.views = new Map(); // id of a message -> AnswerView
    this.frame = 0;
    this.watching = false;
    this.listen();
    this.openAddress();
    this.start();
  }

  listen() {
    const input = get("input");
    this.grow = growWithText(input);
    input.addEventListener("input", () => this.showButtons());
    input.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || isComposing(event)) return;
      event.preventDefault();
      this.send();
    });
    get("send").addEventListener("click", () => this.send());
    get("stop").addEventListener("click", () => this.generations.stop(this.current));
    get("new").addEventListener("click", () => this.openNew());
    get("settings-button").addEventListener("click", () => this.drawer.open(this.current.system));
    get("language").addEventListener("click", () => this.switchLanguage());
    addEventListener("keydown", (event) => {
      if (isComposing(event)) return;
      if (event.key === "Escape" && !document.querySelector("dialog[open]")) this.generations.stop(this.current);
      if (event.key.toLowerCase() === "o" && event.shiftKey && (event.ctrlKey || event.metaKey)) {
        event.preventDefault();
        this.openNew();
      }
    });
    addEventListener("hashchange", () => this.openAddress());
    addEventListener("pagehide", () => this.generations.leave());
    addEventListener("pageshow", () => (this.generations.left = false)); // the browser kept it: "back"
    this.store.watch((id) => this.onOtherTab(id));
  }

  // The server

  async start() {
    try {
      const settings = await this.server.loadSettings();
      get("model").textContent = settings.model;
      this.drawer.showDefaults(settings.chat);
      this.showWelcome();
    } catch (error) {
      if (!(error instanceof ServerError)) throw error;
      if (error.kind === "gone") this.watchServer("gone");
      else if (error.kind === "busy") this.watchServer("loading");
      else this.showBanner(error.kind, errorText(error));
    }
  }

  /** Says what is wrong with the server, and asks until it is well again. */
  async watchServer(state) {
    this.showBanner(state);
    if (this.watching) return;
    this.watching = true;
    for (let seconds = 1; ; seconds = Math.min(10, seconds * 1.5)) {
      await new Promise((resolve) => setTimeout(resolve, seconds * 1000));
      const health = await this.server.health();
      if (health === "ready") break;
      this.showBanner(health);
    }
    this.watching = false;
    this.showBanner("back");
    setTimeout(() => get("banner").dataset.state === "back" && this.showBanner(null), 4000);
    await this.start(); // it may be another model now
  }

  /** `state` is the name of a label, unless `text` says more. */
  showBanner(state, text = state && label(state)) {
    const banner = get("banner");
    banner.dataset.state = state ?? "";
    banner.hidden = !state;
    banner.textContent = text ?? "";
  }

  savedKey() {
    try {
      return sessionStorage.getItem("bc2.key") ?? this.store.setting("key") ?? "";
    } catch {
      return "";
    }
  }

  /** For this tab, or for good if the user said so. */
  keepKey(key, keep) {
    this.store.set("key", keep ? key : null);
    try {
      sessionStorage.setItem("bc2.key", key);
    } catch {
      // blocked: asked again after a reload
    }
    if (get("banner").dataset.state === "key") this.showBanner(null);
  }

  // Conversations

  load(id) {
    const running = this.generations.of({ id });
    if (running) return running.conversation;
    const conversation = this.store.conversation(id);
    return conversation && settle(conversation);
  }

  /** Adds the conversation on the screen to the tab's history; `id` is empty for one without messages. */
  setAddress(id) {
    if (location.hash.slice(1) === id) return;
    history.pushState(null, "", location.pathname + location.search + (id && `#${id}`));
  }

  /** The address was edited, or the user went back or forward. */
  openAddress() {
    const id = location.hash.slice(1);
    if (this.current && this.current.id === id) return;
    const conversation = id && this.load(id);
    if (conversation) this.show(conversation);
    else this.openNew();
  }

  open(id) {
    if (id === this.current.id) return;
    const conversation = this.load(id);
    if (!conversation) return this.showList(); // another tab has deleted it
    // Not left to the hashchange event, which comes later: text sent before it would go to the previous conversation.
    this.show(conversation);
    this.setAddress(id);
  }

  openNew() {
    this.show(makeConversation(this.store.setting("system") ?? ""));
    this.setAddress("");
    this.sidebar.toggle(false);
    if (!matchMedia("(pointer: coarse)").matches) get("input").focus(); // there a keyboard would cover the page
  }

  rename(id, title) {
    const conversation = id === this.current.id ? this.current : this.load(id);
    if (conversation) {
      conversation.title = titleOf(title);
      this.store.save(conversation);
    }
    this.showTitle();
    this.showList();
  }

  remove(id) {
    const conversation = this.load(id);
    this.generations.stop(conversation);
    this.store.delete(id);
    if (id === this.current.id) this.openNew();
    this.showList();
    return () => {
      if (conversation) this.store.restore(conversation);
      this.showList();
    };
  }

  onOtherTab(id) {
    this.showList();
    if (id !== this.current.id || this.generations.of(this.current)) return;
    const conversation = this.load(id);
    if (conversation) this.show(conversation);
  }

  setSystem(text) {
    this.current.system = text;
    if (this.current.leaf) this.store.save(this.current);
    this.store.set("system", text || null);
  }

  // Messages

  send() {
    const input = get("input");
    if (!input.value.trim() || this.generations.of(this.current)) return;
    const text = input.value;
    input.value = "";
    this.grow();
    this.ask(this.current, this.current.leaf, text);
  }

  /** A question below the message `parent`, and its answer. */
  ask(conversation, parent, text) {
    const question = addMessage(conversation, parent, "user", text);
    this.answer(conversation, question.id);
  }

  answer(conversation, parent) {
    this.write(conversation, addMessage(conversation, parent, "assistant", ""));
  }

  write(conversation, message) {
    const done = this.generations.write(conversation, message, this.drawer.values());
    this.store.save(conversation);
    this.setAddress(conversation.id);
    this.show(conversation);
    this.keeper.jump();
    return done;
  }

  actions() {
    const conversation = this.current;
    const idle = (action) => (...values) => this.generations.of(conversation) || action(...values);
    return {
      edit: idle((message, text) => this.ask(conversation, message.parent, text)),
      regenerate: idle((message) => this.answer(conversation, message.parent)),
      resume: idle((message) => this.write(conversation, message)),
      show: idle((message) => {
        showVersion(conversation, message);
        this.store.save(conversation);
        this.show(conversation);
      }),
    };
  }

  onChanged(conversation) {
    if (conversation !== this.current) return;
    this.frame ||= requestAnimationFrame(() => this.showRunning());
  }

  showRunning() {
    this.frame = 0;
    const running = this.generations.of(this.current);
    if (!running) return;
    this.views.get(running.message.id)?.update();
    const text = stateText(running.message);
    if (get("announcer").textContent !== text) announce(text);
  }

  onEnded(conversation, message) {
    this.showList();
    if (conversation !== this.current) return;
    this.views.get(message.id)?.update();
    this.showButtons();
    // The log is no live region while it grows: the answer is read out once, whole.
    announce(`${message.content.slice(0, 4000)} ${stateText(message)}`);
  }

  // The screen

  show(conversation) {
    this.current = conversation;
    const messages = branch(conversation);
    const actions = this.actions();
    this.views.clear();
    const elements = messages.map((message) => {
      const siblings = versions(conversation, message);
      if (message.role === "user") return userView(message, siblings, actions);
      const view = new AnswerView(message, siblings, actions);
      this.views.set(message.id, view);
      return view.element;
    });
    get("log").replaceChildren(...elements);
    get("empty").hidden = elements.length > 0;
    get("main").classList.toggle("new", elements.length === 0);
    this.showTitle();
    this.showWelcome();
    this.showButtons();
    this.showList();
    this.keeper.jump();
  }

  showTitle() {
    const title = this.current.title || label("untitled");
    get("title").textContent = title;
    document.title = this.current.title ? `${title} – bc2_jax` : "bc2_jax";
  }

  showWelcome() {
    const { settings } = this.server;
    get("welcome-text").textContent = settings
      ? label("welcomeText", { model: settings.model, tokens: settings.max_model_len })
      : "";
  }

  showButtons() {
    const running = Boolean(this.generations.of(this.current));
    get("send").hidden = running;
    get("stop").hidden = !running;
    get("send").disabled = !get("input").value.trim();
    get("log").classList.toggle("busy", running);
  }

  showList() {
    this.sidebar.show(this.store.conversations(), this.current.id, this.generations.running);
  }

  switchLanguage() {
    setLanguage(language() === "zh" ? "en" : "zh");
    this.store.set("language", language());
    this.show(this.current);
    this.drawer.showDefaults(this.server.settings?.chat);
    if (this.watching) this.showBanner(get("banner").dataset.state);
    applyLabels(document);
  }
}

new Page();

// The drawer with the sampler's settings and the system prompt, and the question for an API key.

import { make } from "./dom.js";
import { label } from "./labels.js";

// name: [least, most, step, whether the least itself is legal]. `settings` of the server has the defaults.
const FIELDS = {
  temperature: [0, Infinity, 0.1, true],
  top_p: [0, 1, 0.05, false],
  top_k: [0, Infinity, 1, true],
  repetition_penalty: [0, Infinity, 0.05, false],
  presence_penalty: [-2, 2, 0.1, true],
  frequency_penalty: [-2, 2, 0.1, true],
  max_tokens: [1, Infinity, 1, true],
  seed: [0, 2 ** 32 - 1, 1, true],
};
const WHOLE = ["top_k", "max_tokens", "seed"];

/** The number a field's text stands for: null if it is empty, NaN if it is not legal. */
export function readNumber(name, text) {
  const [least, most, , included] = FIELDS[name];
  if (text.trim() === "") return null;
  const value = Number(text);
  const legal = value <= most && (included ? value >= least : value > least);
  return legal && Number.isFinite(value) && (!WHOLE.includes(name) || Number.isInteger(value)) ? value : NaN;
}

function rangeText(name) {
  const [least, most, , included] = FIELDS[name];
  return `${included ? "≥" : ">"} ${least}${most === Infinity ? "" : ` , ≤ ${most}`}`.replace(" ,", ",");
}

export class SettingsDrawer {
  /** `onSystem(text)`, when the system prompt was edited. */
  constructor(dialog, store, onSystem) {
    this.dialog = dialog;
    this.store = store;
    this.system = dialog.querySelector("#system");
    this.inputs = {};
    const fields = dialog.querySelector("#fields");
    for (const name of Object.keys(FIELDS)) fields.append(this.numberField(name));
    this.stop = dialog.querySelector("#stop-texts");
    const saved = store.setting("sampler") ?? {};
    for (const [name, input] of Object.entries(this.inputs)) input.value = saved[name] ?? "";
    this.stop.value = (Array.isArray(saved.stop) ? saved.stop : []).join("\n");
    this.stop.addEventListener("input", () => this.changed());
    this.system.addEventListener("input", () => onSystem(this.system.value));
    dialog.querySelector("#reset").addEventListener("click", () => this.reset());
    dialog.querySelector(".close").addEventListener("click", () => dialog.close());
    dialog.addEventListener("click", (event) => {
      if (event.target === dialog) dialog.close(); // beside the drawer
    });
    for (const name of Object.keys(FIELDS)) this.check(name);
  }

  numberField(name) {
    const input = make("input", { type: "text", inputMode: "decimal", id: `field-${name}`, autocomplete: "off" });
    const text = make("small", { id: `text-${name}` });
    input.setAttribute("aria-describedby", text.id);
    const title = make("span", { textContent: label(name) });
    title.dataset.label = name;
    input.addEventListener("input", () => this.changed());
    input.addEventListener("keydown", (event) => this.step(event, name));
    this.inputs[name] = input;
    return make("label", { className: "field" }, title, input, text);
  }

  /** Arrow keys change a number by its step, from the default if the field is empty. */
  step(event, name) {
    const direction = { ArrowUp: 1, ArrowDown: -1 }[event.key];
    if (!direction) return;
    event.preventDefault();
    const input = this.inputs[name];
    const value = Number(input.value || input.placeholder) || 0;
    const next = String(Number((value + direction * FIELDS[name][2]).toFixed(4)));
    if (Number.isNaN(readNumber(name, next))) return;
    input.value = next;
    this.changed();
  }

  check(name) {
    const input = this.inputs[name];
    const bad = Number.isNaN(readNumber(name, input.value));
    input.setAttribute("aria-invalid", String(bad));
    input.parentElement.querySelector("small").textContent = bad ? label("legal", { range: rangeText(name) }) : label(`${name}Text`);
  }

  changed() {
    for (const name of Object.keys(FIELDS)) this.check(name);
    this.store.set("sampler", this.values());
  }

  /** What a request names beside its messages: only what differs from the model's defaults. */
  values() {
    const values = {};
    for (const [name, input] of Object.entries(this.inputs)) {
      const value = readNumber(name, input.value);
      if (value !== null && !Number.isNaN(value)) values[name] = value;
    }
    const stop = this.stop.value.split("\n").filter(Boolean);
    if (stop.length) values.stop = stop;
    return values;
  }

  reset() {
    for (const input of Object.values(this.inputs)) input.value = "";
    this.stop.value = "";
    this.changed();
  }

  /** The server's defaults, shown where a field is empty. */
  showDefaults(defaults) {
    for (const [name, input] of Object.entries(this.inputs)) {
      input.placeholder = name === "seed" ? label("random") : String(defaults?.[name] ?? "");
    }
    for (const name of Object.keys(FIELDS)) this.check(name);
  }

  open(system) {
    this.system.value = system;
    this.dialog.showModal();
  }
}

/** Asks for an API key. Gives the key, or null if the dialog was closed without one. */
export function askKey(dialog, wasWrong, keep) {
  const input = dialog.querySelector("#key");
  dialog.querySelector("#key-text").textContent = label(wasWrong ? "keyWrong" : "keyText");
  input.value = "";
  dialog.showModal();
  input.focus();
  return new Promise((resolve) => {
    const use = dialog.querySelector("#use-key");
    const give = () => {
      const key = input.value.trim();
      if (!key) return;
      keep(key, dialog.querySelector("#keep-key").checked);
      end(key);
    };
    const enter = (event) => event.key === "Enter" && give();
    const closed = () => end(null);
    const end = (key) => {
      use.removeEventListener("click", give);
      input.removeEventListener("keydown", enter);
      dialog.removeEventListener("close", closed);
      dialog.close();
      resolve(key);
    };
    use.addEventListener("click", give);
    input.addEventListener("keydown", enter);
    dialog.addEventListener("close", closed);
  });
}

// Small parts that several places of the page use.

import { label } from "./labels.js";

const SVG = "http://www.w3.org/2000/svg";

/** Element `name` with properties, e.g. make("p", {className: "state"}, "text"). Strings become text nodes. */
export function make(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}

export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

/** A button with an icon; its name in the page's language is its title and accessible name. */
export function iconButton(name, hint, onClick) {
  const button = make("button", { type: "button", className: "quiet" }, icon(name));
  button.dataset.hint = hint;
  button.title = label(hint);
  button.setAttribute("aria-label", button.title);
  button.addEventListener("click", onClick);
  return button;
}

/** Whether a keydown of Enter ends a line of an input method and is none of ours. Safari ends the composition before
 * the event and marks it by the key code 229 alone. */
export const isComposing = (event) => event.isComposing || event.keyCode === 229;

/** Copies `text`; the modern way works only over https and on this machine. Returns whether it worked. */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = make("textarea", { value: text, readOnly: true, className: "offscreen" });
    const focused = document.activeElement;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    focused?.focus();
    return done;
  }
}

/** A button that copies what `text()` gives and says so for a moment. */
export function copyButton(hint, text) {
  const button = iconButton("copy", hint, async () => {
    const done = await copyText(text());
    button.replaceChildren(icon(done ? "check" : "copy"));
    announce(label(done ? "copied" : "copyFailed"));
    setTimeout(() => button.replaceChildren(icon("copy")), 1500);
  });
  button.classList.add("copy");
  return button;
}

/** Says `text` to a screen reader, without showing it. */
export function announce(text) {
  document.getElementById("announcer").textContent = text;
}

let toastTimer = 0;

/** A line at the bottom for 8 seconds, with one action. */
export function toast(text, actionLabel, action) {
  const place = document.getElementById("toast");
  const hide = () => {
    clearTimeout(toastTimer);
    place.hidden = true;
  };
  hide();
  const button = make("button", { type: "button", textContent: actionLabel });
  button.addEventListener("click", () => {
    hide();
    action();
  });
  place.replaceChildren(make("span", { textContent: text }), button);
  place.hidden = false;
  toastTimer = setTimeout(hide, 8000);
}

/** A textarea as high as its text; its style sheet sets the most. */
export function growWithText(area) {
  const grow = () => {
    area.style.height = "auto";
    area.style.height = `${area.scrollHeight + area.offsetHeight - area.clientHeight}px`;
  };
  area.addEventListener("input", grow);
  return grow;
}

/** Keeps `scroller` at its end while its content grows, unless the user scrolled up. */
export class EndKeeper {
  constructor(scroller, content, toEnd) {
    this.scroller = scroller;
    this.toEnd = toEnd; // the button that leads back
    this.atEnd = true;
    this.top = 0;
    scroller.addEventListener("scroll", () => this.look(), { passive: true });
    toEnd.addEventListener("click", () => this.jump());
    const observer = new ResizeObserver(() => this.follow());
    observer.observe(content);
    observer.observe(scroller); // a phone's keyboard opens
  }

  look() {
    const { scrollTop, scrollHeight, clientHeight } = this.scroller;
    // Content that grew moves the end away without the user: only moving up leaves it.
    if (scrollHeight - scrollTop - clientHeight < 32) this.atEnd = true;
    else if (scrollTop < this.top) this.atEnd = false;
    this.top = scrollTop;
    this.toEnd.hidden = this.atEnd || scrollHeight - scrollTop - clientHeight < 32;
  }

  follow() {
    if (this.atEnd) this.scroller.scrollTop = this.scroller.scrollHeight;
    this.look();
  }

  jump() {
    this.atEnd = true;
    this.follow();
  }
}

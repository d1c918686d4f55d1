// Text inside a block of Markdown -> DOM nodes. Built from text nodes and elements named here: no HTML of a text is
// ever parsed, and the only attribute that comes from a text is the address of an http(s) link.

const DEPTH = 16; // emphasis inside emphasis; deeper marks stay letters
const LABEL = 300; // longest text of a link and
const TARGET = 1500; // longest address: a row of "[" costs no quadratic time
const PUNCTUATION = /[!-/:-@[-`{-~]/;
const ADDRESS = /https?:\/\/[\w\-.~:/?#[\]@!$&'()*+,;=%]+/iy; // ASCII alone: Chinese text may follow without a space
const TICKS = /`+/y;
const IN_ANGLES = /<(https?:\/\/[^\s<>]{1,1000})>/iy;

/** The address if a browser would open it with http or https, else null. */
export function safeAddress(text) {
  try {
    const url = new URL(text);
    return url.protocol === "http:" || url.protocol === "https:" ? url.href : null;
  } catch {
    return null; // relative or malformed: there is no page it could be relative to
  }
}

function makeLink(href, children) {
  const link = document.createElement("a");
  link.href = href;
  link.rel = "noopener noreferrer";
  link.target = "_blank";
  link.title = href; // a label may claim another address
  link.append(...children);
  return link;
}

/** [text](address "title") at `start`, or null. Brackets and parentheses inside must be balanced. */
function readLink(text, start) {
  const end = balanced(text, start, "[", "]", LABEL);
  if (end < 0 || text[end + 1] !== "(") return null;
  const label = text.slice(start + 1, end);
  const close = balanced(text, end + 1, "(", ")", TARGET);
  if (close < 0) return null;
  const inside = text.slice(end + 2, close).trim();
  const match = /^<?([^\s<>]+)>?(?:\s+(?:"[^"]*"|'[^']*'))?$/.exec(inside);
  const href = match && safeAddress(match[1]);
  return href ? { label, href, end: close + 1 } : null;
}

function balanced(text, start, open, close, most) {
  let depth = 0;
  for (let i = start; i < Math.min(text.length, start + most); i++) {
    if (text[i] === "\\") i++;
    else if (text[i] === open) depth++;
    else if (text[i] === close && --depth === 0) return i;
  }
  return -1;
}

/** A bare address without the punctuation that ends the sentence around it. */
function trimAddress(address) {
  for (;;) {
    const last = address.at(-1);
    if (/[.,;:!?'*_~]/.test(last)) address = address.slice(0, -1);
    else if (last === ")" && count(address, ")") > count(address, "(")) address = address.slice(0, -1);
    else if (last === "]" && count(address, "]") > count(address, "[")) address = address.slice(0, -1);
    else return address;
  }
}

const count = (text, letter) => text.split(letter).length - 1;

/** Whether a run of * _ ~ may begin or end emphasis, by its neighbours. CommonMark's rule fails where Chinese
 * punctuation meets the marks (**“引用”**后), so a mark needs no more than a visible neighbour on its inner side. */
function flanks(text, start, end) {
  const before = text[start - 1] ?? " ";
  const after = text[end] ?? " ";
  const inWord = /[A-Za-z0-9]/.test(before) && /[A-Za-z0-9]/.test(after);
  const letters = inWord && (text[start] === "_" || end - start === 1); // snake_case and 2*3*4 are no emphasis
  return { opens: !letters && /\S/.test(after), closes: !letters && /\S/.test(before) };
}

class Line {
  constructor() {
    this.nodes = []; // Node, or {mark, length, opens}: a run that may still begin emphasis
    this.open = []; // indices of such runs, innermost last
    this.letters = "";
  }

  flush() {
    if (this.letters) this.nodes.push(document.createTextNode(this.letters));
    this.letters = "";
  }

  add(node) {
    this.flush();
    this.nodes.push(node);
  }

  /** A run of `length` times `mark`: ends what it can end, then may begin something itself. */
  run(mark, length, { opens, closes }) {
    this.flush();
    while (closes && length > 0) {
      const at = this.open.findLastIndex((index) => this.nodes[index].mark === mark);
      if (at < 0) break;
      const opener = this.nodes[this.open[at]];
      const used = Math.min(2, length, opener.length);
      if (mark === "~" && used < 2) break;
      this.wrap(this.open[at], mark === "~" ? "del" : used === 2 ? "strong" : "em");
      this.open.length = at + 1;
      opener.length -= used;
      length -= used;
      if (!opener.length) this.close(at);
    }
    if (!length) return;
    if (opens && this.open.length < DEPTH) {
      this.open.push(this.nodes.length);
      this.nodes.push({ mark, length });
    } else {
      this.letters += mark.repeat(length);
    }
  }

  wrap(index, name) {
    const element = document.createElement(name);
    element.append(...this.nodes.splice(index + 1).map(toNode));
    this.nodes.push(element);
  }

  close(at) {
    this.nodes.splice(this.open[at], 1);
    this.open.length = at;
  }

  finish() {
    this.flush();
    return this.nodes.map(toNode);
  }
}

const toNode = (item) => (item instanceof Node ? item : document.createTextNode(item.mark.repeat(item.length)));

/** Code, emphasis, links and letters of `text`, as nodes. */
export function renderInline(text, { links = true } = {}) {
  const line = new Line();
  const unclosed = new Set(); // lengths of runs of ` that nothing closes: looked for once
  let i = 0;
  const addLink = (href, children, end) => {
    line.add(makeLink(href, children));
    i = end;
  };
  while (i < text.length) {
    const letter = text[i];
    if (letter === "\\" && PUNCTUATION.test(text[i + 1] ?? "")) {
      line.letters += text[i + 1];
      i += 2;
      continue;
    }
    if (letter === "`") {
      TICKS.lastIndex = i;
      const length = TICKS.exec(text)[0].length;
      const end = unclosed.has(length) ? -1 : closingTicks(text, i + length, length);
      if (end < 0) {
        unclosed.add(length);
        line.letters += "`".repeat(length);
        i += length;
      } else {
        const code = document.createElement("code");
        code.textContent = trimCode(text.slice(i + length, end));
        line.add(code);
        i = end + length;
      }
      continue;
    }
    if (links && (letter === "[" || (letter === "!" && text[i + 1] === "["))) {
      // An image is never fetched: its address could carry the conversation away. It is a link.
      const link = readLink(text, letter === "!" ? i + 1 : i);
      if (link) {
        addLink(link.href, renderInline(link.label || link.href, { links: false }), link.end);
        continue;
      }
    }
    if (links && (letter === "<" || letter === "h" || letter === "H")) {
      const found = readAddress(text, i);
      if (found) {
        addLink(found.href, [found.text], found.end);
        continue;
      }
    }
    if (letter === "*" || letter === "_" || letter === "~") {
      let end = i + 1;
      while (text[end] === letter) end++;
      line.run(letter, end - i, flanks(text, i, end));
      i = end;
      continue;
    }
    line.letters += letter;
    i++;
  }
  return line.finish();
}

function closingTicks(text, from, length) {
  const runs = /`+/g;
  runs.lastIndex = from;
  for (let run = runs.exec(text); run; run = runs.exec(text)) if (run[0].length === length) return run.index;
  return -1;
}

/** One space on both sides is there to keep a ` inside apart from the marks. */
function trimCode(code) {
  const padded = code.startsWith(" ") && code.endsWith(" ") && code.trim();
  return padded ? code.slice(1, -1) : code;
}

function readAddress(text, i) {
  if (text[i] === "<") {
    IN_ANGLES.lastIndex = i;
    const match = IN_ANGLES.exec(text);
    const href = match && safeAddress(match[1]);
    return href ? { href, text: match[1], end: i + match[0].length } : null;
  }
  if (/[A-Za-z0-9]/.test(text[i - 1] ?? "")) return null;
  ADDRESS.lastIndex = i;
  const match = ADDRESS.exec(text);
  const address = match && trimAddress(match[0]);
  const href = address && safeAddress(address);
  return href ? { href, text: address, end: i + address.length } : null;
}

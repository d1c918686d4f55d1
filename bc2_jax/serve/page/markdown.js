// Markdown -> DOM nodes, block by block, so that a text that grows changes only its last block on the screen.
//
// Paragraphs, headings, lists, quotes, tables, rules and fenced code, as chat models write them. Departures from
// CommonMark: a line break stays one, spaces before a paragraph stay (Chinese paragraphs are indented with them, and
// do not become code), a list inside a list needs an indent of two, and HTML is text.

import { renderInline } from "./inline.js";

const FENCE = /^( {0,3})(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*))?$/;
const RULE = /^ {0,3}(?:(?:-[ \t]*){3,}|(?:\*[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const ITEM = /^([ \t]*)([-*+]|\d{1,9}[.)])(?:[ \t]+|$)/;
const QUOTE = /^ {0,3}>[ ]?/;
const DEPTH = 8; // lists and quotes inside each other; deeper ones are paragraphs

const isBlank = (line) => line.trim() === "";
const indentOf = (line) => /^[ \t]*/.exec(line)[0].replaceAll("\t", "    ").length;

/** `line` without up to `width` columns of space at its beginning. */
function dedent(line, width) {
  let i = 0;
  for (let column = 0; i < line.length && column < width; i++) {
    if (line[i] === " ") column++;
    else if (line[i] === "\t") column += 4;
    else break;
  }
  return line.slice(i);
}

/** The item of a list that `line` begins, or null. A mark alone is none: "-" may become "---", "**" a bold word. */
function readItem(line) {
  const match = ITEM.exec(line);
  if (!match || match[0].length === match[1].length + match[2].length || RULE.test(line)) return null;
  const indent = indentOf(line);
  const ordered = match[2].length > 1;
  const spaces = match[0].length - match[1].length - match[2].length;
  const content = indent + match[2].length + (spaces > 4 ? 1 : spaces);
  return { indent, ordered, content, start: ordered ? parseInt(match[2], 10) : null };
}

const beginsBlock = (line) =>
  FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || readItem(line) !== null;

/** Blocks of `lines`, each with the lines `from`..`to` (not included) it stands on. */
export function parseBlocks(lines, depth = 0) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (isBlank(lines[at])) {
      at++;
      continue;
    }
    const block = readBlock(lines, at, depth);
    blocks.push({ ...block, from: at });
    at = block.to;
  }
  return blocks;
}

function readBlock(lines, at, depth) {
  const line = lines[at];
  const fence = FENCE.exec(line);
  if (fence) return readCode(lines, at, fence);
  const heading = HEADING.exec(line);
  if (heading) {
    return { type: "heading", level: heading[1].length, text: withoutMarks(heading[2] ?? ""), to: at + 1 };
  }
  if (RULE.test(line)) return { type: "rule", to: at + 1 };
  if (depth < DEPTH && QUOTE.test(line)) return readQuote(lines, at, depth);
  if (depth < DEPTH && readItem(line)) return readList(lines, at, depth);
  return readTable(lines, at) ?? readParagraph(lines, at, depth);
}

/** The text of a heading without #s that close it: "Title ##". */
function withoutMarks(text) {
  text = text.trimEnd();
  let end = text.length;
  while (text[end - 1] === "#") end--;
  return end === 0 || /[ \t]/.test(text[end - 1]) ? text.slice(0, end).trimEnd() : text;
}

function readCode(lines, at, [, indent, marks, language]) {
  const end = new RegExp(`^ {0,3}${marks[0]}{${marks.length},}[ \\t]*$`);
  let to = at + 1;
  while (to < lines.length && !end.test(lines[to])) to++;
  const text = lines.slice(at + 1, to).map((line) => dedent(line, indent.length));
  if (to === lines.length && text.at(-1) === "") text.pop(); // still written, and its newest line is empty
  return { type: "code", language: language.trim(), text: text.join("\n"), to: Math.min(to + 1, lines.length) };
}

function readQuote(lines, at, depth) {
  let to = at;
  while (to < lines.length && QUOTE.test(lines[to])) to++;
  const inner = lines.slice(at, to).map((line) => line.replace(QUOTE, ""));
  return { type: "quote", blocks: parseBlocks(inner, depth + 1), to };
}

function readList(lines, at, depth) {
  const first = readItem(lines[at]);
  const items = [];
  let to = at;
  let loose = false;
  for (;;) {
    const item = to < lines.length ? readItem(lines[to]) : null;
    if (!item || item.ordered !== first.ordered || item.indent >= first.indent + 2 || item.indent + 2 <= first.indent) break;
    const end = endOfItem(lines, to, item);
    const [line, ...more] = lines.slice(to, end);
    const width = innerIndent(more, item);
    const inner = [line.slice(ITEM.exec(line)[0].length), ...more.map((other) => dedent(other, width))];
    items.push(parseBlocks(inner, depth + 1));
    to = end;
    let next = to;
    while (next < lines.length && isBlank(lines[next])) next++;
    const after = next < lines.length ? readItem(lines[next]) : null;
    if (next > to && after?.ordered === first.ordered && Math.abs(after.indent - first.indent) < 2) {
      loose = true;
      to = next;
    }
  }
  return { type: "list", ordered: first.ordered, start: first.start, items, loose, to };
}

/** Lines of an item: its first, all that are indented, and those that continue its paragraph without an indent. */
function endOfItem(lines, at, item) {
  let end = at + 1;
  for (let next = end; next < lines.length; next++) {
    const line = lines[next];
    if (isBlank(line)) continue;
    const inside = indentOf(line) >= Math.min(item.content, item.indent + 2);
    const lazy = next === end && !beginsBlock(line) && !isTable(lines, next);
    if (!inside && !lazy) break;
    end = next + 1;
  }
  return end;
}

/** What all indented lines of an item have before them: the width of its mark, or less if all have less. */
function innerIndent(lines, item) {
  const indents = lines.filter((line) => !isBlank(line)).map(indentOf);
  return Math.min(item.content, ...indents.filter((indent) => indent >= item.indent + 2));
}

function splitRow(line) {
  const cells = line.trim().replace(/^\|/, "").split(/(?<!\\)\|/);
  if (cells.length > 1 && isBlank(cells.at(-1))) cells.pop();
  return cells.map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function isTable(lines, at) {
  const [head, marks] = [lines[at], lines[at + 1] ?? ""];
  if (!head.includes("|") || !marks.includes("-") || !/^[ \t|:-]+$/.test(marks) || !marks.includes("|")) return false;
  const cells = splitRow(marks);
  return cells.every((cell) => /^:?-+:?$/.test(cell)) && cells.length === splitRow(head).length;
}

function readTable(lines, at) {
  if (!isTable(lines, at)) return null;
  const head = splitRow(lines[at]);
  const align = splitRow(lines[at + 1]).map((cell) =>
    cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : null,
  );
  let to = at + 2;
  const rows = [];
  for (; to < lines.length && !isBlank(lines[to]) && !beginsBlock(lines[to]); to++) {
    const cells = splitRow(lines[to]);
    rows.push(head.map((_, column) => cells[column] ?? ""));
  }
  return { type: "table", head, align, rows, to };
}

function readParagraph(lines, at, depth) {
  let to = at + 1;
  const ends = (line) => isBlank(line) || (depth < DEPTH ? beginsBlock(line) : FENCE.test(line));
  while (to < lines.length && !ends(lines[to]) && !isTable(lines, to)) to++;
  return { type: "paragraph", text: lines.slice(at, to).join("\n").trimEnd(), to };
}

function make(name, ...children) {
  const element = document.createElement(name);
  element.append(...children);
  return element;
}

/** The element of a block. `codeTools(code)` gives the nodes beside a code block's language, e.g. a copy button. */
export function renderBlock(block, codeTools = () => []) {
  if (block.type === "heading") return make(`h${block.level}`, ...renderInline(block.text));
  if (block.type === "rule") return make("hr");
  if (block.type === "quote") return make("blockquote", ...block.blocks.map((inner) => renderBlock(inner, codeTools)));
  if (block.type === "list") return renderList(block, codeTools);
  if (block.type === "table") return renderTable(block);
  if (block.type === "code") {
    const code = make("code", block.text);
    const name = make("span", block.language);
    const pre = make("pre", code);
    pre.tabIndex = 0; // scrolled sideways with the keyboard
    const figure = make("figure", make("figcaption", name, ...codeTools(code)), pre);
    figure.className = "code";
    return figure;
  }
  return make("p", ...renderInline(block.text));
}

function renderList(block, codeTools) {
  const list = make(block.ordered ? "ol" : "ul");
  if (block.ordered && block.start !== 1) list.start = block.start;
  for (const blocks of block.items) {
    const item = make("li");
    blocks.forEach((inner, number) => {
      const tight = number === 0 && inner.type === "paragraph" && !block.loose;
      item.append(tight ? make("span", ...renderInline(inner.text)) : renderBlock(inner, codeTools));
    });
    list.append(item);
  }
  return list;
}

function renderTable({ head, align, rows }) {
  const row = (name, cells) =>
    make("tr", ...cells.map((cell, column) => {
      const element = make(name, ...renderInline(cell));
      if (align[column]) element.className = align[column];
      return element;
    }));
  const table = make("table", make("thead", row("th", head)), make("tbody", ...rows.map((cells) => row("td", cells))));
  const frame = make("div", table);
  frame.className = "table";
  frame.tabIndex = 0;
  return frame;
}

/** Shows a text in `element` and keeps the elements of all blocks that a longer text leaves as they are. */
export class MarkdownView {
  constructor(element, codeTools) {
    this.element = element;
    this.codeTools = codeTools;
    this.text = "";
    this.blocks = []; // {source, at: where it begins in the text, element}
    this.rendered = 0; // blocks rendered so far, for tests
  }

  update(text) {
    text = text.replace(/\r\n?/g, "\n");
    // More text can change the last block, and join it to the one before (a list after an empty line). Not more.
    const kept = text.startsWith(this.text) ? Math.max(0, this.blocks.length - 2) : 0;
    const from = kept ? this.blocks[kept].at : 0;
    const lines = text.slice(from).split("\n");
    const starts = [from];
    for (const line of lines) starts.push(starts.at(-1) + line.length + 1);
    const fresh = parseBlocks(lines);
    fresh.forEach((block, i) => {
      const source = lines.slice(block.from, block.to).join("\n");
      const old = this.blocks[kept + i];
      if (old?.source === source) {
        old.at = starts[block.from];
        return;
      }
      const element = renderBlock(block, this.codeTools);
      this.rendered++;
      if (old) old.element.replaceWith(element);
      else this.element.append(element);
      this.blocks[kept + i] = { source, at: starts[block.from], element };
    });
    for (const old of this.blocks.splice(kept + fresh.length)) old.element.remove();
    this.text = text;
  }
}

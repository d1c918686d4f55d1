// Server-sent events out of the bytes of a response, whatever way the network cuts them.

/** Text in pieces of any size -> events {data} and comments {comment}, as WHATWG's "event stream" defines lines. */
export class EventParser {
  constructor() {
    this.rest = ""; // of a line that has not ended
    this.data = [];
    this.halfEnd = false; // the last piece ended in \r: a \n that comes next belongs to it
  }

  /** The events that are whole with this piece. What follows the last empty line waits for the next one. */
  push(text) {
    if (!text) return [];
    if (this.halfEnd && text[0] === "\n") text = text.slice(1);
    const lines = (this.rest + text).split(/\r\n|\n|\r/);
    this.halfEnd = text.endsWith("\r");
    this.rest = lines.pop();
    return lines.flatMap((line) => this.line(line));
  }

  line(line) {
    if (line === "") {
      const data = this.data;
      this.data = [];
      return data.length ? [{ data: data.join("\n") }] : [];
    }
    if (line.startsWith(":")) return [{ comment: line.slice(1).trim() }];
    const colon = line.indexOf(":");
    const field = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (field === "data") this.data.push(value);
    return [];
  }
}

/** Events of a ReadableStream of UTF-8 bytes; a character that two reads share is decoded whole. */
export async function* readEvents(body) {
  const decoder = new TextDecoder();
  const parser = new EventParser();
  const reader = body.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      yield* parser.push(done ? decoder.decode() : decoder.decode(value, { stream: true }));
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {}); // whoever stops reading stops the answer; it may have ended by itself
  }
}

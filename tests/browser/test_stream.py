"""The stream of an answer, cut anywhere: the same events and the same text."""

from __future__ import annotations

import random

from tests.browser.mock_server import MockServer
from tests.browser.tab import Tab

EVENTS = {
    "data: a\n\n": [{"data": "a"}],
    "data:a\n\ndata:  b\n\n": [{"data": "a"}, {"data": " b"}],
    "data: a\ndata: b\n\n": [{"data": "a\nb"}],
    "data: a\r\n\r\ndata: b\r\rdata: c\n\r\n": [{"data": "a"}, {"data": "b"}, {"data": "c"}],
    ": queued 3\n\n:ping\n\n": [{"comment": "queued 3"}, {"comment": "ping"}],
    "event: x\nid: 1\nretry: 5\ndata: a\n\n": [{"data": "a"}],
    "\n\n\ndata\n\nx\n\n": [{"data": ""}],
    "data: a\n": [],
    "data: a": [],
    "": [],
    'data: {"a": "data: x\\n\\n"}\n\n': [{"data": '{"a": "data: x\\n\\n"}'}],
    "data: 你好🙂\n\n: 字\n\ndata: é\u2028\u0085\n\n": [
        {"data": "你好🙂"},
        {"comment": "字"},
        {"data": "é\u2028\u0085"},
    ],
    "\ufeffdata: a\n\n": [{"data": "a"}],
}

READ = """
  const results = [];
  for (const pieces of argument) {
    const body = new ReadableStream({start(controller) {
      for (const piece of pieces) controller.enqueue(new Uint8Array(piece));
      controller.close();
    }});
    const events = [];
    for await (const event of module.readEvents(body)) events.push(event);
    results.push(events);
  }
  return results;
"""


def cuts(data: bytes, places: list[int]) -> list[list[int]]:
    ends = [0, *sorted(places), len(data)]
    return [list(data[a:b]) for a, b in zip(ends, ends[1:], strict=False)]


def test_every_stream_in_every_pair_of_pieces(module_tab: Tab) -> None:
    cases = [(text, [place]) for text in EVENTS for place in range(len(text.encode()) + 1)]
    cases += [(text, list(range(len(text.encode())))) for text in EVENTS]  # byte by byte, with an empty first piece
    found = module_tab.module("stream", READ, [cuts(text.encode(), places) for text, places in cases])
    for (text, places), events in zip(cases, found, strict=True):
        assert events == EVENTS[text], (text, places)


def test_long_streams_in_random_pieces(module_tab: Tab) -> None:
    draw = random.Random(0)
    cases, expected = [], []
    for _ in range(60):
        texts = [draw.choice(list(EVENTS)) for _ in range(12)]
        texts = [text for text in texts if text.endswith(("\n\n", "\n\r\n")) and not text.startswith("\ufeff")]
        data = "".join(texts).encode()
        cases.append(cuts(data, draw.sample(range(len(data)), min(len(data), 20))))
        expected.append([event for text in texts for event in EVENTS[text]])
    assert module_tab.module("stream", READ, cases) == expected


def test_an_answer_over_the_network_in_small_pieces(tab: Tab, server: MockServer) -> None:
    server.steps = ["你好", "，🙂", "wörld", "\n\n- 一\n", "- 二"]
    for server.cut in (1, 2, 7):
        tab.send("hi")
    assert tab.answers() == ["你好，🙂wörld\n\n一\n二"] * 3


def test_a_stream_that_is_no_longer_read_is_cancelled(module_tab: Tab) -> None:
    body = """
      let cancelled = false;
      const encoder = new TextEncoder();
      const body = new ReadableStream({
        pull(controller) { controller.enqueue(encoder.encode('data: a\\n\\n')); },
        cancel() { cancelled = true; },
      });
      for await (const event of module.readEvents(body)) break;
      return cancelled;"""
    assert module_tab.module("stream", body)


def test_what_is_sent_of_a_long_conversation_keeps_the_servers_limits(module_tab: Tab) -> None:
    body = """
      const conversation = module.makeConversation('system');
      let last = null;
      for (let round = 0; round < argument.rounds; round++) {
        last = module.addMessage(conversation, last?.id ?? null, 'user',
          `question ${round}` + '字'.repeat(argument.size));
        if (round === argument.rounds - 1) break;
        last = module.addMessage(conversation, last.id, 'assistant', `answer ${round}`);
      }
      const limits = {messages: argument.messages, body_bytes: argument.bytes};
      const {messages, omitted} = module.requestMessages(conversation, last.id, limits);
      return [messages.map((message) => message.content.slice(0, 12)), omitted,
              new TextEncoder().encode(JSON.stringify(messages)).length];"""
    few = module_tab.module("conversation", body, {"rounds": 5, "size": 0, "messages": 6, "bytes": 1 << 20})
    assert few[0] == ["system", "question 2", "answer 2", "question 3", "answer 3", "question 4"] and few[1] == 2
    all_of_them = module_tab.module("conversation", body, {"rounds": 5, "size": 0, "messages": 10, "bytes": 1 << 20})
    assert len(all_of_them[0]) == 10 and all_of_them[1] == 0
    short = module_tab.module("conversation", body, {"rounds": 9, "size": 1000, "messages": 500, "bytes": 16384})
    assert short[1] == 6 and short[2] < 16384 - 4000


def test_a_character_is_not_halved_in_a_title(module_tab: Tab) -> None:
    assert module_tab.module("conversation", "return module.titleOf(argument)", "🙂" * 70) == "🙂" * 60

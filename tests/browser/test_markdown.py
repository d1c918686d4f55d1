"""Markdown as DOM: what it gives for each construct, and that text which grows gives the same as text that is whole."""

from __future__ import annotations

import random

import pytest

from tests.browser.tab import Tab

RENDER = """
  const element = document.createElement('div');
  new module.MarkdownView(element).update(argument);
  return element.innerHTML.replaceAll(' tabindex="0"', '');
"""
CODE = '<figure class="code"><figcaption><span>{}</span></figcaption><pre><code>{}</code></pre></figure>'
LINK = '<a href="{0}" rel="noopener noreferrer" target="_blank" title="{0}">{1}</a>'
TABLE = '<div class="table"><table><thead>{}</thead><tbody>{}</tbody></table></div>'

CASES = {
    # paragraphs
    "a": "<p>a</p>",
    "a\nb\n\n\nc": "<p>a\nb</p><p>c</p>",
    "a\r\nb\rc": "<p>a\nb\nc</p>",
    "    段首": "<p>    段首</p>",
    "": "",
    " \n\n": "",
    "<b>&amp;</b>": "<p>&lt;b&gt;&amp;amp;&lt;/b&gt;</p>",
    # headings and rules
    "# A\ntext\n###### B ##\n####### C": "<h1>A</h1><p>text</p><h6>B</h6><p>####### C</p>",
    "#no\n# C#": "<p>#no</p><h1>C#</h1>",
    "a\n***\nb\n- - -": "<p>a</p><hr><p>b</p><hr>",
    # emphasis
    "**a** __b__ *c* _d_ ~~e~~": "<p><strong>a</strong> <strong>b</strong> <em>c</em> <em>d</em> <del>e</del></p>",
    "***a*** **a *b* c**": "<p><em><strong>a</strong></em> <strong>a <em>b</em> c</strong></p>",
    "2 * 3 * 4, 2*3*4, snake_case_name, __init__.py":
    "<p>2 * 3 * 4, 2*3*4, snake_case_name, <strong>init</strong>.py</p>",
    "**“引用”**后，**重要：**看": "<p><strong>“引用”</strong>后，<strong>重要：</strong>看</p>",
    "这*很*好": "<p>这<em>很</em>好</p>",
    "**open *and": "<p>**open *and</p>",
    "*a **b* c**": "<p><em>a <em><em>b</em> c</em></em></p>",
    r"\*a\* \\ \n \`": "<p>*a* \\ \\n `</p>",
    "~a~ ** **": "<p>~a~ ** **</p>",
    # code
    "`a*b*` ``c ` d`` `` `e` ``": "<p><code>a*b*</code> <code>c ` d</code> <code>`e`</code></p>",
    "`open": "<p>`open</p>",
    "```python\nx  = 1\n\n# y\n```\nz": CODE.format("python", "x  = 1\n\n# y") + "<p>z</p>",
    "text\n~~~\n```\n~~~": "<p>text</p>" + CODE.format("", "```"),
    "````md title\n```\n````": CODE.format("md title", "```"),
    "```\nopen <b>\n": CODE.format("", "open &lt;b&gt;"),
    "```": CODE.format("", ""),
    "  ```\n    a\n  b\n  ```": CODE.format("", "  a\nb"),
    # links
    "[a *b*](https://x.org/)": "<p>" + LINK.format("https://x.org/", "a <em>b</em>") + "</p>",
    '[a](http://x.org/(b) "title")': "<p>" + LINK.format("http://x.org/(b)", "a") + "</p>",
    "[a](<https://x.org/>)": "<p>" + LINK.format("https://x.org/", "a") + "</p>",
    "![图](https://x.org/a.png)": "<p>" + LINK.format("https://x.org/a.png", "图") + "</p>",
    "[](https://x.org/)": "<p>" + LINK.format("https://x.org/", "https://x.org/") + "</p>",
    "见https://x.org/a。谢谢": "<p>见" + LINK.format("https://x.org/a", "https://x.org/a") + "。谢谢</p>",
    "(https://x.org/a_(b)), <http://y.org/>": "<p>(" + LINK.format("https://x.org/a_(b)", "https://x.org/a_(b)") + "), "
    + LINK.format("http://y.org/", "http://y.org/") + "</p>",
    "**https://x.org/**": "<p><strong>" + LINK.format("https://x.org/", "https://x.org/") + "</strong></p>",
    "[a](javascript:alert(1)) [b](x.html) [c] [d](": "<p>[a](javascript:alert(1)) [b](x.html) [c] [d](</p>",
    "[a [b](https://x.org/)](https://y.org/)": "<p>" + LINK.format("https://y.org/", "a [b](https://x.org/)") + "</p>",
    "`https://x.org` xhttps://x.org": "<p><code>https://x.org</code> xhttps://x.org</p>",
    # lists
    "- a\n- b": "<ul><li><span>a</span></li><li><span>b</span></li></ul>",
    "text\n* a\n+ b": "<p>text</p><ul><li><span>a</span></li><li><span>b</span></li></ul>",
    "3. a\n4) b": '<ol start="3"><li><span>a</span></li><li><span>b</span></li></ol>',
    "- a\n\n- b": "<ul><li><p>a</p></li><li><p>b</p></li></ul>",
    "1. a\n  - b\n    - c\n2. d":
    "<ol><li><span>a</span><ul><li><span>b</span><ul><li><span>c</span></li></ul></li></ul></li>"
    "<li><span>d</span></li></ol>",
    "1. a\n   ```\n   x\n     y\n   ```\n\n   b\n2. c": "<ol><li><span>a</span>" + CODE.format("", "x\n  y")
    + "<p>b</p></li><li><span>c</span></li></ol>",
    "- a\nlazy\n\nout": "<ul><li><span>a\nlazy</span></li></ul><p>out</p>",
    "1. a\n- b\n2. c":
    '<ol><li><span>a</span></li></ol><ul><li><span>b</span></li></ul><ol start="2"><li><span>c</span></li></ol>',
    "-\n**\n-a\n1.b": "<p>-\n**\n-a\n1.b</p>",
    "- # a\n- > b": "<ul><li><h1>a</h1></li><li><blockquote><p>b</p></blockquote></li></ul>",
    # quotes
    "> a\n> > b\n>\n> - c\nd":
    "<blockquote><p>a</p><blockquote><p>b</p></blockquote><ul><li><span>c</span></li></ul></blockquote>"
    "<p>d</p>",
    # tables
    "| a | b |\n|:-:|--:|\n| 1 | `2` |\n3\n\nx": TABLE.format(
        '<tr><th class="center">a</th><th class="right">b</th></tr>',
        '<tr><td class="center">1</td><td class="right"><code>2</code></td></tr>'
        '<tr><td class="center">3</td><td class="right"></td></tr>',
    ) + "<p>x</p>",
    "text\na | b\n--- | ---\n1 \\| 2 | 3 | 4": "<p>text</p>"
    + TABLE.format("<tr><th>a</th><th>b</th></tr>", "<tr><td>1 | 2</td><td>3</td></tr>"),
    "a | b\n--- | --- | ---": "<p>a | b\n--- | --- | ---</p>",
    "| a |\n|---|": TABLE.format("<tr><th>a</th></tr>", ""),
}  # fmt: skip

GROWING = """
  // One view gets longer and longer prefixes, another each prefix as a whole. Says where they first differ.
  for (const {text, cuts} of argument) {
    const grown = document.createElement('div');
    const view = new module.MarkdownView(grown);
    for (const cut of [...cuts, text.length]) {
      const whole = document.createElement('div');
      view.update(text.slice(0, cut));
      new module.MarkdownView(whole).update(text.slice(0, cut));
      if (grown.innerHTML !== whole.innerHTML) return [text.slice(0, cut), cuts, grown.innerHTML, whole.innerHTML];
    }
  }
  return null;
"""


def test_every_construct(module_tab: Tab) -> None:
    found = {text: module_tab.module("markdown", RENDER, text) for text in CASES}
    wrong = {text: (found[text], expected) for text, expected in CASES.items() if found[text] != expected}
    assert wrong == {}


def test_growing_text_gives_what_whole_text_gives(module_tab: Tab) -> None:
    """Every construct letter by letter, and mixtures of their lines cut anywhere."""
    draw = random.Random(0)
    samples = [{"text": text, "cuts": list(range(len(text)))} for text in CASES]
    lines = [line for text in CASES for line in text.split("\n")] + [""] * 20
    for _ in range(300):
        text = "\n".join(draw.choice(["", "", "  ", "    ", "> ", "- "]) + draw.choice(lines) for _ in range(12))
        samples.append({"text": text, "cuts": sorted(draw.sample(range(len(text)), min(12, len(text))))})
    assert module_tab.module("markdown", GROWING, samples) is None


def test_random_punctuation_gives_no_error_and_loses_no_letter(module_tab: Tab) -> None:
    draw = random.Random(1)
    alphabet = list("*_~`[]()!<>#-+|\\:.&1 \n\t") + ["https://x.org", "字", "a", "\n\n", "```"]
    texts = ["".join(draw.choice(alphabet) for _ in range(40)) + f" q{number}" for number in range(500)]
    body = """return argument.map((text) => {
        const element = document.createElement('div');
        new module.MarkdownView(element).update(text);
        return element.textContent; })"""
    for number, text in enumerate(module_tab.module("markdown", body, texts)):
        assert text.rstrip().endswith(f"q{number}"), texts[number]


def test_a_text_that_grows_renders_its_last_block_only(module_tab: Tab) -> None:
    body = """
      const element = document.createElement('div');
      const view = new module.MarkdownView(element);
      let text = '';
      const first = () => element.firstChild;
      view.update('start\\n\\n');
      const kept = first();
      for (let block = 0; block < 100; block++) {
        text += block ? `paragraph ${block}\\n\\n` : 'start\\n\\n';
        view.update(text);
      }
      return [view.rendered, element.children.length, first() === kept];"""
    assert module_tab.module("markdown", body) == [100, 100, True]


LONG = [
    "[" * 20000, "*a _b " * 4000, "> " * 5000, "- " * 5000, "`a``b" * 4000, "# " + " #" * 9000, "**" * 9000 + "a",
    "(" * 9000 + "[a](" * 3000, "```" + " " * 20000 + "`", "|" * 9000 + "\n" + "|-" * 9000, "a\n" * 9000,
    "https://x.org/" + "(" * 9000,
]  # fmt: skip


@pytest.mark.parametrize("text", LONG, ids=[text[:8] for text in LONG])
def test_no_text_takes_long(module_tab: Tab, text: str) -> None:
    body = """
      const element = document.createElement('div');
      const before = performance.now();
      new module.MarkdownView(element).update(argument);
      return performance.now() - before;"""
    assert module_tab.module("markdown", body, text) < 1500  # ms; quadratic ones take minutes

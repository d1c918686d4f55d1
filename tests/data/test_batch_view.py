from pathlib import Path

import numpy as np
import pytest

from bc2_jax.data.batch import Rows, row_to_example
from bc2_jax.data.batch_view import read_answers, read_runs, render_html, render_row, row_arrays, row_title
from bc2_jax.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def row(tokenizer: Tokenizer) -> Rows:
    ids = [*tokenizer.encode("if 龘\x1b[2J\n"), 2, *tokenizer.encode("<b>&return"), 195]
    return row_to_example(np.array([*ids, 0, 0, 0], np.uint32))


def test_runs_cover_the_row_and_spell_its_text(row: Rows, tokenizer: Tokenizer) -> None:
    runs = list(read_runs(row, tokenizer))
    assert [run.start for run in runs] == [0, *(run.stop for run in runs[:-1])] and runs[-1].stop == len(row["labels"])
    assert "".join(run.text for run in runs) == "if 龘\x1b[2J\n</s><b>&return<reserved_106><unk> x 2"
    for run in runs:
        assert set(row["segment_ids"][run.start : run.stop].tolist()) == {run.segment}
        assert {label == -100 for label in row["labels"][run.start : run.stop].tolist()} == {run.ignored}
    (character,) = (run for run in runs if "龘" in run.text)
    assert character.stop - character.start >= 3  # spelt in bytes, shown as one
    assert [(run.text, run.segment, run.ignored) for run in runs if run.special] == [
        ("</s>", 1, True), ("<reserved_106>", 2, True), ("<unk> x 2", 0, True)
    ]  # fmt: skip


def test_title_and_arrays_are_the_rows_own(row: Rows) -> None:
    tokens = int((row["input_ids"] != 0).sum())
    assert row_title(row) == f"2 segments, {tokens} tokens, {tokens - 2} targets, 2 tokens without, 2 padding"
    lines = dict(line.split(maxsplit=1) for line in row_arrays(row).splitlines())
    assert {name: list(map(int, text.split())) for name, text in lines.items()} == {
        name: array[:12].tolist() for name, array in row.items()
    }


def test_terminal_text(row: Rows, tokenizer: Tokenizer) -> None:
    text = render_row(row, tokenizer)
    assert "\x1b" not in text.plain  # data can't send commands to the terminal
    first, second = text.plain.split("[segment 2, ")
    assert first.startswith("[segment 1, positions 0..") and first.endswith("]\nif 龘\u241b[2J\n</s>\n")
    assert "]\n<b>&return<reserved_106>\n[padding, 2 tokens]\n<unk> x 2" in second
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert styles["</s>"] == "dim magenta" and styles["if"] == "cyan" and "green" in styles.values()


def test_page(row: Rows, tokenizer: Tokenizer, tmp_path: Path) -> None:
    page = render_html([("batch 0 <1>", row)], tokenizer)
    assert "<h3>batch 0 &lt;1&gt;: 2 segments" in page and "<b>" not in page
    eos = int(np.flatnonzero(row["input_ids"] == 2)[0])
    assert (
        f'<span class="s1 special ignored" title="id 2; label -100; segment 1; position {eos}">&lt;/s&gt;</span>'
        in page
    )
    assert page.count('class="pad') == 1


def test_a_conversation_shows_its_targets(tokenizer: Tokenizer) -> None:
    """The labels themselves are shown: eos where the next id is the user's role, and nothing of a question."""
    parts = [([195], 0), (tokenizer.encode("return"), 0), ([196], 0), (tokenizer.encode("if\x1b"), 1), ([195], 1)]
    parts += [(tokenizer.encode("<i>"), 0), ([196], 0), (tokenizer.encode("<b>"), 1), ([2], 1)]
    ids = [token | (1 << 31) * target for here, target in parts for token in here]
    ids[0] |= 1 << 30
    row = row_to_example(np.array([*ids, 0, 0], np.uint32))
    assert read_answers(row, 1, tokenizer) == ["if\x1b</s>", "<b></s>"] and read_answers(row, 0, tokenizer) == []
    plain = render_row(row, tokenizer).plain
    assert "\n[targets] if\u241b</s>\n[targets] <b></s>\n[padding" in plain
    page = render_html([("row", row)], tokenizer)
    assert "<div class=row>targets of segment 1: <b>&lt;b&gt;&lt;/s&gt;</b></div>" in page


def test_a_text_has_no_list_of_targets(row: Rows, tokenizer: Tokenizer) -> None:
    assert [read_answers(row, segment, tokenizer) for segment in (0, 1, 2)] == [[], [], []]


def test_branches_are_numbered_and_their_answers_shown(tokenizer: Tokenizer) -> None:
    target, start, branch = 1 << 31, 1 << 30, 1 << 29
    marked = [[196 | branch, *(token | target for token in (*tokenizer.encode(text), 2))] for text in ("yes", "no")]
    ids = [195 | start, *tokenizer.encode("if"), *marked[0], *marked[1], 195 | start, 0, 0]
    row = row_to_example(np.array(ids, np.uint32))
    assert row_title(row).startswith("4 segments, ")
    begin = 1 + len(tokenizer.encode("if"))
    lines = dict(line.split(maxsplit=1) for line in row_arrays(row).splitlines())
    assert lines["segment_ids"].split()[begin - 1 : begin + 1] == ["1", "1.1"]
    text, page = render_row(row, tokenizer).plain, render_html([("row", row)], tokenizer)
    for name, answer in (("1.1", "yes"), ("1.2", "no")):
        assert f"[segment {name}, positions {begin}.." in text and f"[targets] {answer}</s>" in text
        assert f"targets of segment {name}: <b>{answer}&lt;/s&gt;</b>" in page

"""Licence headers are found, and files under one licence are compared without them."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bc2_jax.curate import minhash
from bc2_jax.curate.minhash import header_end, header_tokens
from bc2_jax.curate.tokens import hash_tokens, without_first

LICENCE = """Copyright 2031 The Example Authors. All rights reserved.

Permission is given to whoever obtains a copy of this work to use, copy, change and pass it on, provided that this
notice is kept with every copy. The work is offered as it is, without warranty of any kind, and nobody who wrote it is
liable for any claim or damage that arises from its use, however caused and on whatever theory of liability.
"""
BODIES = [
    "import os\n\n\ndef size(path):\n    return os.stat(path).st_size\n",
    "class Queue:\n    def push(self, item):\n        self.items.append(item)\n",
    "GREETING = 'hello'\nfor name in names:\n    print(GREETING, name)\n",
]
STYLES = [
    lambda text: "".join(f"# {line}".rstrip() + "\n" for line in text.splitlines()) + "\n",
    lambda text: "".join(f"// {line}".rstrip() + "\n" for line in text.splitlines()),
    lambda text: "/*\n" + "".join(f" * {line}".rstrip() + "\n" for line in text.splitlines()) + " */\n\n",
    lambda text: "/**\n" + text + "**/\n",
    lambda text: "<!--\n" + text + "-->\n",
    lambda text: '"""' + text + '"""\n',
    lambda text: "#!/usr/bin/env python\n" + "".join(f"# {line}\n" for line in text.splitlines()),
    lambda text: "".join(f"-- {line}\n" for line in text.splitlines()),
    lambda text: "// A short note.\n\n" + "/* " + text + " */\n",
]


@pytest.mark.parametrize("style", STYLES)
def test_a_header_in_any_style_does_not_decide(style):
    texts = [style(LICENCE) + body for body in BODIES]
    assert [text[header_end(text) :].strip() for text in texts] == [body.strip() for body in BODIES]
    tokens = hash_tokens(texts)
    whole = minhash.signatures(tokens)
    own = minhash.signatures(without_first(tokens, header_tokens(texts)))
    assert minhash.similarity(whole[0], whole[1]) > 0.53 > 0.1 > minhash.similarity(own[0], own[1])
    # Copies are still found, and the files themselves if they are nothing but a licence.
    assert minhash.similarity(own[0], minhash.signatures(hash_tokens([BODIES[0]]))[0]) == 1
    assert header_tokens([style(LICENCE), style(LICENCE) + "x = 1\n"]).tolist() == [0, 0]


@pytest.mark.parametrize(
    "text",
    ["", "# A heading\n\nProse about copyright.\n", "import os  # copyright\n", "# How to\n# sort it\nx = sorted(y)\n"],
)  # fmt: skip
def test_no_header(text):
    assert header_end(text) == 0


@given(st.lists(st.tuples(st.text(max_size=30), st.integers(0, 9)), max_size=6))
def test_first_tokens_are_left_out(documents):
    tokens = hash_tokens([text for text, _ in documents])
    counts = [
        min(count, size) for (_, count), size in zip(documents, tokens.offsets[1:] - tokens.offsets[:-1], strict=True)
    ]
    left = without_first(tokens, pa.array(counts, pa.int64()).to_numpy())
    for place, count in enumerate(counts):
        here = tokens.hashes[tokens.offsets[place] : tokens.offsets[place + 1]]
        assert left.hashes[left.offsets[place] : left.offsets[place + 1]].tolist() == here[count:].tolist()

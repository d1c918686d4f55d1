from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bc2_jax.curate.boilerplate import BoilerplateConfig, remove_boilerplate

CONFIG = BoilerplateConfig()


def test_lines_of_a_web_site_go_and_the_rest_stays_as_it_is():
    texts = [
        "A story.\n\n© 2020 ACME, All Rights Reserved.\nThe end.\n",
        "第一段。\n版权所有 © 2020\n京ICP备12345678号\n第二段。",
        "Nothing here\r\n to remove.",
        "WE USE COOKIES to improve your visit.",
    ]
    kept, removed = remove_boilerplate(texts, ["en", "zh", "en", "fr"], CONFIG)
    assert kept == ["A story.\n\nThe end.\n", "第一段。\n第二段。", texts[2], ""]
    assert removed.tolist() == [1, 2, 0, 1]


def test_code_and_paragraphs_that_mention_a_phrase_stay():
    licence = "# Copyright 2020. All rights reserved.\n"
    paragraph = "The privacy policy of the ministry was debated for weeks. " * 4
    kept, removed = remove_boilerplate([licence, paragraph], ["code", "en"], CONFIG)
    assert kept == [licence, paragraph] and not removed.any()


@given(st.lists(st.lists(st.sampled_from(["good", "a+b", "xA+Bx", "", "aab"]), max_size=6), max_size=6))
def test_phrases_are_literal_and_every_line_is_judged_alone(documents):
    texts = ["\n".join(lines) for lines in documents]
    kept, removed = remove_boilerplate(texts, ["en"] * len(texts), BoilerplateConfig(phrases=("a+b",)))
    for lines, text, count in zip(documents, kept, removed, strict=True):
        expected = [line for line in lines if "a+b" not in line.lower()]
        assert text == "\n".join(expected) and count == len(lines) - len(expected)


def test_without_phrases_nothing_is_removed():
    kept, removed = remove_boilerplate(["all rights reserved"], ["en"], BoilerplateConfig(phrases=()))
    assert kept == ["all rights reserved"] and removed.dtype == np.int64 and not removed.any()


def test_bad_phrases_are_named():
    for phrases in (("",), ("two\nlines",)):
        with pytest.raises(ValueError, match="boilerplate.phrases = .* is not valid: "):
            BoilerplateConfig(phrases=phrases)

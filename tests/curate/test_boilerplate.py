from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bc2_jax.curate.cuts import BoilerplateConfig, remove_boilerplate

CONFIG = BoilerplateConfig()


def test_lines_of_a_web_site_go_and_the_rest_stays_as_it_is():
    texts = [
        "A story.\n\n© 2020 ACME, All Rights Reserved.\nThe end.\n",
        "第一段。\n版权所有 © 2020 某某网\n京ICP备12345678号\n未经授权，不得转载本站内容。\n第二段。",
        "Nothing here\r\n to remove.",
        "WE USE COOKIES to improve your visit.",
    ]
    kept, removed = remove_boilerplate(texts, ["en", "zh", "en", "fr"], CONFIG)
    assert kept == ["A story.\n\nThe end.\n", "第一段。\n第二段。", texts[2], ""]
    assert [line.document for line in removed] == [0, 1, 1, 1, 3]
    assert [line.text for line in removed][:2] == ["© 2020 ACME, All Rights Reserved.", "版权所有 © 2020 某某网"]


@pytest.mark.parametrize(
    "line",
    [
        "（三）未经许可，播放或者复制广播、电视的，本法另有规定的除外。",
        "第九条 未经授权以他人名义发布信息的，由主管部门责令改正。",
        "（二）版权所有人明确声明禁止转载，仍然转载的；",
        "网络运营者应当公开隐私政策和用户协议，明示收集信息的目的。",
        "版权所有者的权利",
        "The Landlord shall maintain a privacy policy and shall process personal data only as stated in it.",
        "All rights reserved to the Licensor under this Agreement may be assigned without consent.",
        "The ministry's privacy policy was debated for weeks.",
        "她说，我们要关注我们的孩子。",
    ],
)
def test_a_sentence_that_mentions_a_phrase_stays(line):
    assert remove_boilerplate([f"Before\n{line}\nafter"], ["zh"], CONFIG) == ([f"Before\n{line}\nafter"], [])


def test_code_and_paragraphs_that_mention_a_phrase_stay():
    licence = "# Copyright 2020. All rights reserved.\n"
    paragraph = "The privacy policy of the ministry was debated for weeks. " * 4
    kept, removed = remove_boilerplate([licence, paragraph], ["code", "en"], CONFIG)
    assert kept == [licence, paragraph] and not removed


@given(
    st.lists(
        st.lists(st.sampled_from(["good", "a+b", "A+B.", "", "aab", "a+b or so many words"]), max_size=6), max_size=6
    )
)
def test_phrases_are_literal_and_every_line_goes_or_stays_whole(documents):
    texts = ["\n".join(lines) for lines in documents]
    config = BoilerplateConfig(phrases=("a+b",), notices=(), around=())
    kept, removed = remove_boilerplate(texts, ["en"] * len(texts), config)
    for number, (lines, text) in enumerate(zip(documents, kept, strict=True)):
        assert text == "\n".join(line for line in lines if line.lower().rstrip(".") != "a+b")
        gone = [line for line in lines if line.lower().rstrip(".") == "a+b"]
        assert [line.text for line in removed if line.document == number] == gone


def test_without_phrases_nothing_is_removed():
    config = BoilerplateConfig(phrases=(), notices=())
    assert remove_boilerplate(["all rights reserved"], ["en"], config) == (["all rights reserved"], [])


def test_bad_phrases_are_named():
    for phrases in (("",), ("two\nlines",)):
        with pytest.raises(ValueError, match="boilerplate.phrases = .* is not valid: "):
            BoilerplateConfig(phrases=phrases)

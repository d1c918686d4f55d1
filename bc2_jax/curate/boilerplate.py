"""Lines that belong to a web site and not to its text: notices of cookies, copyright, scripts, registration.

A line goes whole or stays whole, and it goes only if it is such a notice and little else: a statute on copyright, a
report on a privacy policy and a licence use the same words in sentences of their own.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bc2_jax.validation import require

# The first two rows are C4's (Raffel et al. 2020, section 2.2), which removes every line with "javascript" and drops
# pages of "lorem ipsum".
_PHRASES = (
    "lorem ipsum", "terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies",
    "enable javascript", "javascript must be enabled", "javascript is disabled", "javascript is required",
    "accept all cookies", "terms of service", "terms and conditions apply", "all rights reserved",
    "subscribe to our newsletter", "sign up for our newsletter", "share on facebook", "share on twitter",
    "skip to main content", "skip to content", "sign in to your account", "add to cart", "add to basket", "版权所有",
    "版權所有", "翻印必究", "转载请注明", "请注明出处", "注明出处", "禁止转载", "不得转载", "严禁转载", "谢绝转载",
    "隐私政策", "用户协议", "点击查看更多", "扫码关注", "关注我们", "请启用javascript", "返回顶部", "加入购物车",
)  # fmt: skip
_NOTICES = (
    "all rights reserved", "版权所有 ", "版权所有：", "版权所有:", "版权所有©", "版權所有 ", "版權所有：",
    "版權所有©", "icp备", "icp證", "icp证", "公网安备", "上一篇：", "下一篇：", "上一篇:", "下一篇:",
)  # fmt: skip
_AROUND = (
    "lorem ipsum dolor sit amet", "by using this site", "by continuing to use this site", "you agree to our",
    "you agree to the", "you accept our", "this website", "this site", "our website", "our site", "in your browser",
    "your browser", "to view this page", "to improve your", "your experience", "your visit", "copyright",
    "click here to", "please", "free weekly", "未经授权", "未经许可", "未经允许", "未经本站", "本站", "本网", "本报",
    "本文由", "内容", "任何形式", "浏览器", "整理发布", "谢谢合作", "更多精彩内容", "微信公众号", "公众号", "作者",
    "来源", "链接",
)  # fmt: skip
_SENTENCE = re.compile(r"[.。;；!！?？][\"'”’）)]*\s*$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BoilerplateConfig:
    """Whole lines that are removed, whatever their document is. All phrases are found in upper and lower case."""

    phrases: tuple[str, ...] = _PHRASES
    """A line that consists of them goes."""
    notices: tuple[str, ...] = _NOTICES
    """Beside these a name may stand, in a line that is not a sentence."""
    around: tuple[str, ...] = _AROUND
    """What counts as theirs in a line that has one of them."""
    min_share: float = 0.6
    """Of a line's letters that phrases, and what may stand around them, must cover."""
    min_share_notice: float = 0.25
    """The same of a line that has a notice and does not end like a sentence."""
    max_characters: int = 160
    """Longer lines stay: they are paragraphs that mention such a phrase."""
    skip: tuple[str, ...] = ("code",)
    """Languages that are left alone."""

    def __post_init__(self) -> None:
        for field in ("phrases", "notices", "around"):
            value = getattr(self, field)
            require(all(value), f"boilerplate.{field}", value, "a phrase can't be empty")
            require(not any("\n" in phrase for phrase in value), f"boilerplate.{field}", value, "one line each")
        for field in ("min_share", "min_share_notice"):
            require(0 <= getattr(self, field) <= 1, f"boilerplate.{field}", getattr(self, field), "it must be in 0..1")
        require(self.max_characters > 0, "boilerplate.max_characters", self.max_characters, "it must be positive")


class Line(NamedTuple):
    """A line that was removed."""

    document: int
    """Its index among the texts."""
    text: str


def remove_boilerplate(
    texts: Sequence[str], languages: Sequence[str], config: BoilerplateConfig
) -> tuple[list[str], list[Line]]:
    """The texts without the lines that `config` names, and these lines by document and place."""
    import pyarrow as pa
    import pyarrow.compute as pc

    result = list(texts)
    removed: list[Line] = []
    chosen = [i for i, language in enumerate(languages) if language not in config.skip]
    deciding = config.phrases + config.notices
    if not deciding or not chosen:
        return result, removed
    # One automaton for all phrases; the lines are only looked at in documents that have one.
    pattern = _either(deciding)
    strings = pa.array([texts[i] for i in chosen], pa.large_string())
    found = pc.match_substring_regex(strings, pattern, ignore_case=True).to_numpy(zero_copy_only=False)
    decides = re.compile(pattern, re.IGNORECASE)
    notice = re.compile(_either(config.notices) or "(?!)", re.IGNORECASE)
    counted = re.compile(_either(deciding + config.around), re.IGNORECASE)

    def is_boilerplate(line: str) -> bool:
        if len(line) > config.max_characters or not decides.search(line):
            return False
        covered = sum(_letters(match.group()) for match in counted.finditer(line))
        is_notice = notice.search(line) is not None and _SENTENCE.search(line) is None
        return covered >= (config.min_share_notice if is_notice else config.min_share) * _letters(line)

    for k in np.flatnonzero(found).tolist():
        document = chosen[k]
        lines = texts[document].split("\n")
        out = [is_boilerplate(line) for line in lines]
        if any(out):
            result[document] = "\n".join(line for line, goes in zip(lines, out, strict=True) if not goes)
            removed += [Line(document, line) for line, goes in zip(lines, out, strict=True) if goes]
    return result, removed


def _either(phrases: Sequence[str]) -> str:
    """A regular expression; longer phrases first, because the first that fits is taken."""
    return "|".join(map(re.escape, sorted(phrases, key=lambda phrase: (-len(phrase), phrase))))


def _letters(text: str) -> int:
    return sum(map(str.isalpha, text))

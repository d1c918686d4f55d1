"""Lines that belong to a web site and not to its text: notices of cookies, copyright, scripts, registration."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from bc2_jax.validation import require

# The first two rows are C4's (Raffel et al. 2020, section 2.2), which removes every line with "javascript" and drops
# pages of "lorem ipsum"; here a line has to ask for it.
_ENGLISH = (
    "lorem ipsum", "terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies",
    "enable javascript", "javascript must be enabled", "javascript is disabled", "javascript is required",
    "all rights reserved", "accept all cookies", "terms of service", "terms and conditions apply",
    "subscribe to our newsletter", "sign up for our newsletter", "share on facebook", "share on twitter",
    "skip to main content", "skip to content", "sign in to your account", "add to cart",
)  # fmt: skip
_CHINESE = (
    "版权所有", "版權所有", "ICP备", "ICP證", "ICP证", "公网安备", "未经授权", "未经许可", "转载请注明",
    "禁止转载", "隐私政策", "用户协议", "点击查看更多", "扫码关注", "关注我们", "请启用javascript",
    "上一篇：", "下一篇：", "返回顶部",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class BoilerplateConfig:
    """Lines that are removed, whatever their document is."""

    phrases: tuple[str, ...] = _ENGLISH + _CHINESE
    """A line that contains one of them, in upper or lower case, goes. Empty removes nothing."""
    max_characters: int = 160
    """Longer lines stay: they are paragraphs that mention such a phrase."""
    skip: tuple[str, ...] = ("code",)
    """Languages that are left alone."""

    def __post_init__(self) -> None:
        require(all(self.phrases), "boilerplate.phrases", self.phrases, "a phrase can't be empty")
        require(
            not any("\n" in phrase for phrase in self.phrases), "boilerplate.phrases", self.phrases, "one line each"
        )
        require(self.max_characters > 0, "boilerplate.max_characters", self.max_characters, "it must be positive")


def remove_boilerplate(
    texts: Sequence[str], languages: Sequence[str], config: BoilerplateConfig
) -> tuple[list[str], np.ndarray]:
    """The texts without the lines that `config` names, and int64 [D], how many lines each has lost."""
    import pyarrow as pa
    import pyarrow.compute as pc

    result = list(texts)
    removed = np.zeros(len(texts), np.int64)
    chosen = [i for i, language in enumerate(languages) if language not in config.skip]
    if not config.phrases or not chosen:
        return result, removed
    # One automaton for all phrases; the lines are only looked at in documents that have one.
    pattern = "|".join(map(re.escape, config.phrases))

    def matches(strings: list[str]) -> np.ndarray:
        found = pc.match_substring_regex(pa.array(strings, pa.large_string()), pattern, ignore_case=True)
        return np.flatnonzero(found.to_numpy(zero_copy_only=False))

    hits = [chosen[i] for i in matches([texts[i] for i in chosen])]
    lines = [texts[i].split("\n") for i in hits]
    numbers = np.repeat(np.arange(len(hits)), [len(of_one) for of_one in lines])
    firsts = np.searchsorted(numbers, np.arange(len(hits)))
    flat = [line for of_one in lines for line in of_one]
    gone: dict[int, set[int]] = {}
    for place in matches(flat) if flat else ():
        if len(flat[place]) <= config.max_characters:
            gone.setdefault(int(numbers[place]), set()).add(int(place - firsts[numbers[place]]))
    for number, out in gone.items():
        kept = [line for k, line in enumerate(lines[number]) if k not in out]
        result[hits[number]] = "\n".join(kept)
        removed[hits[number]] = len(out)
    return result, removed

"""Pages that are advertising, rows of search terms or menus.

advertising  The share of a document's letters in phrases of advertising (gambling, pornography, loans, forged papers,
             pills, "add me on WeChat ..."), plus .12 for a messenger's handle or number, .1 for a row of phrases, .1
             for three or more exclamation marks in 100 characters, .1 if no sentence ends. A report on gambling, a page
             on sexual health or a bank's page have some of the phrases in sentences, and stay far below the limit.
search terms A row of short items, or of words, most of which share the same words, with words such as "cheap" and
             "near me" (哪家好, 价格) among them.
menu         Short items without sentences, many of them typical of the menus of web sites (Home, Log in, 联系我们).

The lists in `phrases.json` are short and have what was seen often; they do not replace the safety filter (`safety`).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Sequence

import numpy as np

from bc2_jax.curate.cuts import PHRASES
from bc2_jax.curate.normalization import large_strings
from bc2_jax.curate.tokens import Tokens, find_ngrams, hash_ngrams, hash_tokens
from bc2_jax.data.ngrams import NgramTable, make_table
from bc2_jax.validation import require

_ADVERTISING, _MENUS = PHRASES["advertising"], PHRASES["menus"]
_CHINESE = [phrase for phrases in _ADVERTISING["chinese"].values() for phrase in phrases]
_ENGLISH = _ADVERTISING["english"]
_STOP = " ".join(PHRASES["stop words"])  # parts of these words do not count either
_MENU, _TOPICS, _MENU_WORDS, _FILLERS = (
    frozenset(_MENUS[name]) for name in ("chinese", "chinese topics", "english", "english fillers")
)
_CONTACT = (
    r"(?:微信|vx|wx|v信|weixin|qq群?|whatsapp|telegram|t\.me|电话|手机)[号群]?\s{0,2}[:：/]?\s{0,2}"
    r"\+?[a-z0-9][a-z0-9_ -]{4,}"
    r"|bit\.\w+/\w+|https?://\S+/(?:go|x\d|ref)\b"
)
_COMMERCIAL = (
    r"公司|价格|哪家|电话|排名|多少钱|收费|厂家|批发|优惠|便宜|正规|推广|优化|seo|代理|加盟|招商|官网|下载|免费|培训班|报价|联系方式|"
    r"\b(?:cheap\w*|best|buy|sale|near me|prices?|online|discount|reviews?|emergency|affordable|outlet|24 hour|"
    r"free|local|deals?|for sale)\b"
)
_END = r"[。！？!?…]|\.(?:[\s\"'”)]|$)"
_READ_CHARACTERS = 6_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpamConfig:
    """Limits above which a page is spam; None switches a rule off."""

    max_advertising: float | None = 0.3
    """Share of the letters in phrases of advertising, plus additions for handles, exclamations, no sentences."""
    max_search_terms: float | None = 0.5
    """Share of the items with the same word, in a row of search terms."""
    max_menu: float | None = 0.3
    """Share of the items that are typical of menus, in a page of short items."""
    skip: tuple[str, ...] = ("code",)
    """Languages whose documents are not tested."""

    def __post_init__(self) -> None:
        for field in ("max_advertising", "max_search_terms", "max_menu"):
            value = getattr(self, field)
            require(value is None or value > 0, f"spam.{field}", value, "it must be positive, or None")


def find_spam(
    texts: Sequence[str], languages: Sequence[str], config: SpamConfig, tokens: Tokens | None = None
) -> list[str | None]:
    """For each document None if it stays, else "RULE = VALUE, limit N" of the first rule that it breaks.

    `tokens` are those of `hash_tokens(texts)`, if they are known.
    """
    import pyarrow.compute as pc

    reasons: list[str | None] = [None] * len(texts)
    if not len(texts):
        return reasons
    tokens = hash_tokens(texts) if tokens is None else tokens
    # The rules are slow, so cheap counts select documents first. A long document is neither a row nor a menu.
    looked_at = np.array([language not in config.skip for language in languages])
    characters = np.array([len(text) for text in texts])
    short = np.flatnonzero(looked_at & (characters < _READ_CHARACTERS))
    column = large_strings([texts[i] for i in short.tolist()])
    ends, items = np.full((2, len(texts)), np.inf)
    ends[short] = pc.count_substring_regex(column, pattern=_END).to_numpy()
    items[short] = pc.count_substring_regex(column, pattern=r"[\n|>]").to_numpy() + 1
    phrases = np.zeros(len(texts), np.int64)
    for table in _phrase_tables():
        phrases += np.bincount(find_ngrams(table, tokens)[0], minlength=len(texts))
    rules = (
        ("max_advertising", advertising_share, phrases >= np.clip(characters / 200, 2, 20)),
        ("max_search_terms", search_term_share, ends * 150 < characters),
        ("max_menu", menu_share, (ends * 60 <= characters) & (characters < 40 * items + 20)),
    )
    for name, measure, suspected in rules:
        limit = getattr(config, name)
        for i in np.flatnonzero(suspected & looked_at).tolist() if limit is not None else ():
            if reasons[i] is None and (value := measure(texts[i])) > limit:
                reasons[i] = f"{name} = {value:.4g}, limit {limit:.4g}"
    return reasons


@functools.cache
def _phrase_tables() -> tuple[NgramTable, NgramTable]:
    """Words of the English phrases, and beginnings of the Chinese ones; documents with two of them are tested."""
    words = {word for phrase in _ENGLISH for word in re.findall("[a-z0-9]{4,}", phrase.replace("\\w", " "))}
    words |= {"sex", "xxx"}
    forms = sorted({form for word in words for form in (word, word.capitalize(), word.upper())})
    singles = hash_ngrams(hash_tokens(forms), 1).hashes
    begins = sorted({phrase[:2] for phrase in _CHINESE})
    pairs = hash_ngrams(hash_tokens(begins), 2).hashes
    return make_table(1, singles, np.arange(len(singles))), make_table(2, pairs, np.arange(len(pairs)))


def advertising_share(text: str) -> float:
    """Share of the letters in phrases of advertising, with the additions of the module's docstring."""
    text = text[:_READ_CHARACTERS].lower()
    letters = max(sum(map(str.isalnum, text)), 20)
    covered = sum(sum(map(str.isalnum, match.group())) for match in _PHRASES.finditer(text))
    share = covered / letters
    share += 0.12 * (_CONTACTS.search(text) is not None)
    # A row of phrases without a sentence.
    share += 0.1 * (len(_ROW.findall(text)) >= 8 and _ENDS.search(text) is None)
    share += 0.1 * ((text.count("!") + text.count("！")) * 100 >= 3 * len(text))
    return share + 0.1 * (_ENDS.search(text) is None)


def search_term_share(text: str) -> float:
    """Share of the items with the most common word, 0 for a text that is not a row of search terms."""
    text = text[:_READ_CHARACTERS].lower()
    if len(_COMMERCE.findall(text)) < 2:
        return 0.0
    wide = _is_wide(text)
    items = [item.strip() for item in re.split(r"[,，、;；|\n\t]" + (r"|\s" if wide else ""), text) if item.strip()]
    if wide:
        fragments = [{item[i : i + 2] for i in range(len(item) - 1)} for item in items]
    else:
        words = re.findall(r"\w+", text)
        if len(items) < 6 and len(words) >= 20:
            # Without commas: most phrases have two words that are a third of all.
            common = collections.Counter(word for word in words if word not in _STOP and len(word) > 2).most_common(2)
            return 2.0 * sum(count for _, count in common) / len(words) if len(common) == 2 else 0.0
        fragments = [
            {word for word in re.findall(r"\w+", item) if word not in _STOP and len(word) > 2} for item in items
        ]
    lengths = sorted(len(item) for item in items)
    if len(items) < 6 or not lengths[len(items) // 2] <= (16 if wide else 40):
        return 0.0
    frequency = collections.Counter(fragment for found in fragments for fragment in found)
    return max(frequency.values(), default=0) / len(items)


def menu_share(text: str) -> float:
    """Share of the items that are typical of menus, 0 for a page with sentences or long items."""
    text = text[:_READ_CHARACTERS]
    wide = _is_wide(text)
    items = [item for item in re.split(_SPLIT_WIDE if wide else _SPLIT, text.lower()) if item and not item.isspace()]
    if len(items) < 6:
        return 0.0
    short = sum(len(item.strip()) <= (8 if wide else 24) for item in items)
    if short < 0.8 * len(items):
        return 0.0
    return float(sum((_menu_chinese if wide else _menu_english)(item.strip()) for item in items) / len(items))


def _menu_chinese(item: str) -> float:
    return 1.0 if item in _MENU else 0.7 if item in _TOPICS else 0.0


def _menu_english(item: str) -> float:
    words = re.findall(r"[a-z&]+", item)
    known = sum(word in _MENU_WORDS for word in words)
    telling = any(word in _MENU_WORDS and word not in _FILLERS for word in words)
    return float(telling and len(words) <= 5 and 2 * known > len(words))


def _is_wide(text: str) -> bool:
    return 2 * len(_WIDE.findall(text)) > sum(map(str.isalpha, text))


_WIDE = re.compile("[\u3400-\u9fff]")
_SPLIT = re.compile(r"[\n|>»·•\t/©]| {2,}")
_SPLIT_WIDE = re.compile(r"[\n|>»·•\t/＞｜,，、:： \u3000-]")
_ENDS = re.compile(_END)
_ROW = re.compile(r"(?:^|(?<=[,，、;； \t\n]))[\u3400-\u9fffa-z0-9]{2,8}(?=[,，、;； \t\n]|$)")
_COMMERCE = re.compile(_COMMERCIAL)
_CONTACTS = re.compile(_CONTACT)
# Longer phrases first, because the first alternative that matches is taken.
_ENGLISH_PHRASES = r"\b(?:" + "|".join(sorted(_ENGLISH, key=lambda phrase: -len(phrase))) + r")\b"
_PHRASES = re.compile("|".join([*sorted(_CHINESE, key=lambda phrase: -len(phrase)), _ENGLISH_PHRASES]))

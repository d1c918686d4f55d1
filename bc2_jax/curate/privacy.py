"""Personal data -> placeholders: e-mail, telephone, resident id, bank card and IP addresses.

Checked are the check digit of a Chinese resident id (GB 11643, ISO 7064 MOD 11-2) and its date, the Luhn digit and the
issuer's first digits of a card (ISO/IEC 7812), and the area code of a Chinese landline. Numbers next to letters, digits
or a decimal point are parts of something else, such as a hash, a version or a measurement, and stay.
"""

from __future__ import annotations

import calendar
import dataclasses
import ipaddress
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

KINDS = ("email", "id_number", "card_number", "phone", "ip_address")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrivacyConfig:
    """Which data become <email>, <phone>, <id_number>, <card_number>, <ip_address>."""

    enabled: bool = False
    """Whether anything is replaced."""
    email: bool = True
    """E-mail addresses."""
    phone: bool = True
    """Chinese mobile and landline numbers, and any number written with + and a country code."""
    id_number: bool = True
    """Chinese resident ids of 18 characters with a valid check digit."""
    card_number: bool = True
    """Bank cards of 15 to 19 digits with a valid check digit."""
    ip_address: bool = False
    """Public IPv4 and IPv6 addresses. Off by default, because a version of four parts looks the same; so an IPv4
    address needs a part above 31, which few versions and section numbers have."""
    number_skip: tuple[str, ...] = ("code",)
    """Languages in which numbers stay, because one in ten literals of the right length has a valid check digit by
    chance; e-mail and IP addresses are replaced in all languages."""


class Masked(NamedTuple):
    """Texts without personal data."""

    texts: list[str]
    counts: np.ndarray
    """int64 [D, 5]: how many of each of KINDS were replaced."""


def check_resident_id(number: str) -> bool:
    """Whether an 18-character id has an existing date of birth and a valid check character."""
    year, month, day = int(number[6:10]), int(number[10:12]), int(number[12:14])
    if not 1 <= month <= 12 or not 1 <= day <= calendar.monthrange(year, month)[1]:
        return False
    remainder = sum(int(digit) * pow(2, 17 - i, 11) for i, digit in enumerate(number[:17])) % 11
    return number[17].upper() == "10X98765432"[remainder]


def check_luhn(digits: str) -> bool:
    """Whether the last digit is the Luhn check digit of the others; False for a row of equal digits."""
    doubled = (sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return len(set(digits)) > 1 and (sum(doubled) + sum(map(int, digits[-1::-2]))) % 10 == 0


def _is_card(match: re.Match[str]) -> bool:
    digits = re.sub("[ -]", "", match.group())
    return 15 <= len(digits) <= 19 and check_luhn(digits)


def _is_international(match: re.Match[str]) -> bool:
    # A short number without separators may be the right side of a sum.
    digits = sum(map(str.isdigit, match.group()))
    return 8 <= digits <= 15 and (digits >= 11 or not match.group()[1:].isdigit())


def _is_public(match: re.Match[str]) -> bool:
    try:
        address = ipaddress.ip_address(match.group())
    except ValueError:
        return False
    if not address.is_global:
        return False
    # Only 2000::/3 is assigned; d::e is a name in C++.
    return match.group()[0] in "23" if address.version == 6 else max(address.packed) > 31


class _Rule(NamedTuple):
    kind: str
    rough: str
    """Matches every text that `pattern` matches; in RE2's syntax, for a whole shard at a time."""
    pattern: re.Pattern[str]
    """Starts with a character and looks behind it, because a search for a character is fast."""
    check: Callable[[re.Match[str]], bool] = lambda match: True


_W = "A-Za-z0-9_"
_RULES = (
    _Rule(
        "email", r"[A-Za-z0-9_%+-]@[A-Za-z0-9-]+\.",
        re.compile(r"@((?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24})(?![\w@])", re.ASCII),
    ),
    _Rule(
        "id_number", r"[1-8][0-9]{16}[0-9Xx]",
        re.compile(rf"[1-8](?<![{_W}.][1-8])[0-9]{{5}}(?:18|19|20)[0-9]{{9}}[0-9Xx](?![{_W}]|\.[0-9])"),
        lambda match: check_resident_id(match.group()),
    ),
    _Rule(
        "card_number", r"[2-6][0-9]{3}[ -]?[0-9]{4}[ -]?[0-9]{4}[ -]?[0-9]{3}",
        re.compile(
            rf"[2-6](?<![{_W}./*-][2-6])(?<!(?<![0-9])[0-9]{{4}}[ -][2-6])"
            # The issuer: 22 to 27, 34, 35, 37, 4, 51 to 55, 60, 62, 64, 65.
            r"(?:(?<=4)|(?=[1-5])(?<=5)|(?=[2-7])(?<=2)|(?=[457])(?<=3)|(?=[0245])(?<=6))"
            r"(?:[0-9]{14,18}|[0-9]{3}(?:([ -])[0-9]{4}(?:\1[0-9]{4}){2}(?:\1[0-9]{1,3})?))"
            rf"(?![{_W}*/]|[.-][0-9]| [0-9]{{4}}(?![0-9.]))"
        ),
        _is_card,
    ),
    _Rule(
        "phone", r"\+[0-9][0-9 ()-]{7}",
        re.compile(
            rf"\+(?<![{_W})\]+.]\+)[1-9][0-9]{{0,2}}[ -]?(?:\([0-9]{{1,4}}\)[ -]?)?[0-9](?:[ -]?[0-9]){{5,12}}"
            rf"(?![{_W}]|[.-][0-9])"
        ),
        _is_international,
    ),
    _Rule(
        "phone", r"1[3-9][0-9][ -]?[0-9]{4}[ -]?[0-9]{4}",
        re.compile(rf"1(?<![{_W}.+/*]1)(?<![{_W}]-1)[3-9][0-9]([ -]?)[0-9]{{4}}\1[0-9]{{4}}(?![{_W}*/]|[.-][0-9])"),
    ),
    _Rule(
        "phone", r"0[1-9][0-9]{1,2}[)）]?[ -]?[2-8][0-9]{6}",
        re.compile(
            rf"[(（0](?<![{_W}.+][(（0])(?<![{_W}][-:][(（0])(?:(?<=0)|0)(?:10|2[0-57-9]|[3-9][0-9]{{2}})"
            rf"(?:[)）] ?|[- ])[2-8][0-9]{{6,7}}(?:-[0-9]{{1,5}})?(?![{_W}]|[.-][0-9])"
        ),
        lambda match: (match.group()[0] in "(（") == (")" in match.group() or "）" in match.group()),
    ),
    _Rule(
        "ip_address", r"[0-9]{1,3}\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]",
        re.compile(rf"[0-9](?<![{_W}.-][0-9])[0-9]{{0,2}}(?:\.[0-9]{{1,3}}){{3}}(?![{_W}]|[.-][0-9A-Za-z])"),
        _is_public,
    ),
    _Rule(
        "ip_address", r"[0-9A-Fa-f]{1,4}:[0-9A-Fa-f:]*:[0-9A-Fa-f]{0,4}",
        re.compile(rf"[23](?<![{_W}:.][23])[0-9A-Fa-f]{{0,3}}(?::{{1,2}}[0-9A-Fa-f]{{1,4}}){{1,7}}(?:::)?(?![{_W}:]|\.[0-9])"),
        _is_public,
    ),
)  # fmt: skip
_LOCAL_PART = re.compile(r"[A-Za-z0-9_%+-][A-Za-z0-9_%+.-]{0,63}\Z")


def mask_personal(texts: Sequence[str], languages: Sequence[str], config: PrivacyConfig) -> Masked:
    """Replaces personal data as `config` says; other texts are returned unchanged."""
    import pyarrow as pa
    import pyarrow.compute as pc

    def search(places: np.ndarray, pattern: str) -> np.ndarray:
        strings = pa.array([result[i] for i in places], pa.large_string())
        return places[pc.match_substring_regex(strings, pattern).to_numpy(zero_copy_only=False).astype(bool)]

    result = list(texts)
    counts = np.zeros((len(texts), len(KINDS)), np.int64)
    rules = [rule for rule in _RULES if getattr(config, rule.kind)]
    if not rules or not len(texts):
        return Masked(result, counts)
    suspects = search(np.arange(len(texts)), "|".join(rule.rough for rule in rules))
    prose = np.array([language not in config.number_skip for language in languages], bool)
    for rule in rules:
        chosen = suspects if rule.kind in ("email", "ip_address") else suspects[prose[suspects]]
        for i in search(chosen, rule.rough) if len(chosen) else ():
            replace = _replace_email if rule.kind == "email" else _replace
            result[i], count = replace(result[i], rule)
            counts[i, KINDS.index(rule.kind)] += count
    return Masked(result, counts)


def _replace(text: str, rule: _Rule) -> tuple[str, int]:
    count = 0

    def placeholder(match: re.Match[str]) -> str:
        nonlocal count
        if not rule.check(match):
            return match.group()
        count += 1
        return f"<{rule.kind}>"

    return rule.pattern.sub(placeholder, text), count


def _replace_email(text: str, rule: _Rule) -> tuple[str, int]:
    """Searches for the @, then backwards for the local part."""
    parts: list[str] = []
    done = 0
    for match in rule.pattern.finditer(text):
        local = _LOCAL_PART.search(text, max(done, match.start() - 64), match.start())
        if local is None or ".." in local.group() or local.group().endswith("."):
            continue
        parts += [text[done : local.start()], "<email>"]
        done = match.end()
    return "".join([*parts, text[done:]]), len(parts) // 2

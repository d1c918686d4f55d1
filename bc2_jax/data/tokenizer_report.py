"""Quality of a trained tokenizer: compression of held-out text beside other tokenizers, and checks of its guarantees.

The paper gives compression rates (table 2; Baichuan 2: 0.498) without a formula. Ours are tokens per character (Unicode
code point) and per byte of UTF-8 over all texts of a language, without bos and eos; lower is better.
"""

from __future__ import annotations

import dataclasses
import random
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from bc2_jax.tokenizer import ASSISTANT_ID, BOS_ID, EOS_ID, LONGEST_PIECE, PAD_ID, USER_ID, Tokenizer

T = TypeVar("T")
Encode = Callable[[list[str]], list[list[int]]]
ALL = "all"
_BATCH = 256
# The code points of UTF-16's surrogates are not characters.
_SURROGATES = range(0xD800, 0xE000)
_HARD = {
    "emoji joined by zero-width joiners": "👩‍👩‍👧‍👦👨🏽‍🚀🏳️‍🌈🇨🇳1️⃣",
    "carriage returns": "a\r\nb\r\n\r\n\rc\n\r",
    "tabs": "\t\ta\t b\t\n\t",
    "runs of spaces": " a  b   c" + " " * 67 + "\n" + " " * 16 + "d ",
    "other spaces": "\u3000a\u00a0b\u2003\u200bc\u2028d\u0085e\ufeff",
    "combining marks alone": "\u0301\u0301 \u0e31\n\u20dd\u093f",
    "right to left": "שלום \u202eabc\u202c مرحبا 123 \u200f!",
    "not normalised": "é e\u0301 ﬁ Å Å ｶﾞ ㍿",
    "control characters": "".join(map(chr, range(32))) + "\x7f\x80\x9f",
    "non-characters and private use": "\ufffe\uffff\ufdd0\ue000\U0010ffff\U000f0000\ufffd",
}
_DIGITS = ("0", "2024", "3.14159", "1,234,567", "v1.2.3-rc10", "a1b22c333", " 42 007\n19", "第12章365天")


@dataclasses.dataclass(frozen=True)
class Compression:
    """How one tokenizer encodes the held-out text of one language."""

    tokenizer: str
    language: str
    documents: int
    characters: int
    bytes: int
    tokens: int

    @property
    def tokens_per_character(self) -> float:
        return self.tokens / self.characters

    @property
    def tokens_per_byte(self) -> float:
        return self.tokens / self.bytes


def measure_compression(name: str, encode: Encode, held_out: Mapping[str, Sequence[str]]) -> list[Compression]:
    """One result a language, and one over all languages."""
    results = []
    for language, texts in held_out.items():
        tokens = sum(len(ids) for batch in _batches(texts) for ids in encode(batch))
        sizes = sum(map(len, texts)), sum(len(text.encode()) for text in texts)
        results.append(Compression(name, language, len(texts), *sizes, tokens))
    fields = ("documents", "characters", "bytes", "tokens")
    return [*results, Compression(name, ALL, *(sum(getattr(result, field) for result in results) for field in fields))]


def open_encoder(name: str) -> Encode:
    """A tokenizer to compare with: a SentencePiece model, a tokenizer.json, or `tiktoken:` and an encoding or file.

    A file after `tiktoken:` is a vocabulary in tiktoken's format, used with the pattern of cl100k_base; an encoding
    comes from the folder TIKTOKEN_CACHE_DIR or a download. Raises FileNotFoundError or ValueError with the reason.
    """
    if name.startswith("tiktoken:"):
        return _open_tiktoken(name, name.removeprefix("tiktoken:"))
    legal = "it must be a SentencePiece model, a tokenizer.json or tiktoken:NAME"
    if not Path(name).is_file():
        raise FileNotFoundError(f"--compare = {name!r} is not valid: {legal}.")
    if name.endswith(".json"):
        return _open_json(name)
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_proto=Path(name).read_bytes()).encode
    except RuntimeError as error:
        raise ValueError(f"--compare = {name!r} is not valid: {legal}.") from error


def _open_json(name: str) -> Encode:
    try:
        import tokenizers
    except ImportError as error:
        raise ValueError(f"--compare = {name!r} needs tokenizers: pip install tokenizers.") from error
    try:
        found = tokenizers.Tokenizer.from_file(name)
    except Exception as error:  # the library raises nothing more precise
        raise ValueError(f"--compare = {name!r} is not valid: it is not a tokenizer.json ({error}).") from error
    return lambda texts: [encoding.ids for encoding in found.encode_batch(texts, add_special_tokens=False)]


# As published with tiktoken's definition of cl100k_base.
_CL100K_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|"
    r"\s+(?!\S)|\s"
)


def _open_tiktoken(name: str, encoding: str) -> Encode:
    try:
        import tiktoken
        from tiktoken.load import load_tiktoken_bpe
    except ImportError as error:
        raise ValueError(f"--compare = {name!r} needs tiktoken: pip install 'bc2_jax[tiktoken]'.") from error
    try:
        if Path(encoding).is_file():
            ranks = load_tiktoken_bpe(encoding)
            found = tiktoken.Encoding(encoding, pat_str=_CL100K_PATTERN, mergeable_ranks=ranks, special_tokens={})
        else:
            found = tiktoken.get_encoding(encoding)
    except Exception as error:  # a download fails in many ways, none of them tiktoken's own
        reason = textwrap.shorten(str(error), 200, placeholder=" ...").rstrip(".")
        raise ValueError(
            f"--compare = {name!r} can't be loaded ({type(error).__name__}: {reason}); its vocabulary must be in the "
            f"folder TIKTOKEN_CACHE_DIR, be downloadable, or be named as tiktoken:FILE."
        ) from error
    return lambda texts: found.encode_ordinary_batch(texts)


@dataclasses.dataclass(frozen=True)
class Check:
    """One guarantee of a tokenizer."""

    name: str
    failure: str | None
    """The first counterexample, or None."""


def check_tokenizer(tokenizer: Tokenizer, vocab_size: int, texts: Sequence[str]) -> list[Check]:
    """Checks a tokenizer made by `train_tokenizer`, also on held-out `texts`."""
    checks = {
        f"{vocab_size:,} pieces; ids 0, 1, 2, 195 and 196 have their meaning": _layout_failures(tokenizer, vocab_size),
        "256 bytes, which spell every character": _byte_failures(tokenizer),
        f"no piece is longer than {LONGEST_PIECE} characters": _length_failures(tokenizer),
        "digits are split one by one": _digit_failures(tokenizer),
        f"{len(texts):,} held-out documents come back": _round_trip_failures(tokenizer, enumerate(texts)),
        "every code point comes back": _round_trip_failures(tokenizer, _code_points()),
        f"hard strings come back: {', '.join(_HARD)}": _round_trip_failures(tokenizer, _HARD.items()),
        "text can't forge a special id": _forgery_failures(tokenizer),
    }
    return [Check(name, next(failures, None)) for name, failures in checks.items()]


def _layout_failures(tokenizer: Tokenizer, vocab_size: int) -> Iterator[str]:
    if tokenizer.vocab_size != vocab_size:
        yield f"it has {tokenizer.vocab_size:,} pieces"
    layout = {PAD_ID: "<unk>", BOS_ID: "<s>", EOS_ID: "</s>", USER_ID: "<reserved_106>", ASSISTANT_ID: "<reserved_107>"}
    for token_id, piece in layout.items():
        if tokenizer.piece(token_id) != piece:
            yield f"id {token_id} is {tokenizer.piece(token_id)!r}, not {piece!r}"
    for token_id in range(tokenizer.vocab_size):
        if tokenizer.is_special(token_id) != (token_id <= ASSISTANT_ID):
            yield f"id {token_id}, {tokenizer.piece(token_id)!r}, is{' not' * (token_id <= ASSISTANT_ID)} special"


def _byte_failures(tokenizer: Tokenizer) -> Iterator[str]:
    ids = {tokenizer.piece(i): i for i in range(tokenizer.vocab_size) if tokenizer.is_byte(i)}
    missing = [piece for piece in (f"<0x{value:02X}>" for value in range(256)) if piece not in ids]
    if missing:
        yield f"there is no {missing[0]}"
        return
    # These use every byte that UTF-8 has; the other 13 never occur in text.
    for code in (*range(0x80), *range(0x80, 0x800, 64), *range(0x800, 0x900), *range(0x1000, 0x110000, 0x1000)):
        if code not in _SURROGATES:
            spelt = [ids[f"<0x{value:02X}>"] for value in chr(code).encode()]
            if tokenizer.decode(spelt) != chr(code):
                yield f"the bytes of U+{code:04X} decode to {tokenizer.decode(spelt)!r}"
    for value in (0xC0, 0xC1, *range(0xF5, 0x100)):
        if tokenizer.decode([ids[f"<0x{value:02X}>"]]) != "\ufffd":
            yield f"the byte {value:#x} decodes to {tokenizer.decode([ids[f'<0x{value:02X}>']])!r}"


def _length_failures(tokenizer: Tokenizer) -> Iterator[str]:
    for piece in _learned(tokenizer):
        if len(piece) > LONGEST_PIECE:
            yield f"{piece!r} has {len(piece)}"


def _digit_failures(tokenizer: Tokenizer) -> Iterator[str]:
    for piece in _learned(tokenizer):
        if len(piece) > 1 and re.search("[0-9]", piece):
            yield f"{piece!r} is a piece"
    for text in _DIGITS:
        parts = [tokenizer.decode([i]) for i in tokenizer.encode(text)]
        if [part for part in parts if re.search("[0-9]", part)] != re.findall("[0-9]", text):
            yield f"{text!r} becomes {parts}"


def _learned(tokenizer: Tokenizer) -> Iterator[str]:
    for i in range(tokenizer.vocab_size):
        if not tokenizer.is_special(i) and not tokenizer.is_byte(i):
            yield tokenizer.piece(i)


def _code_points() -> Iterator[tuple[str, str]]:
    for start in range(0, 0x110000, 0x400):
        if start not in _SURROGATES:
            yield f"U+{start:04X} and after", "".join(map(chr, range(start, start + 0x400)))


def _round_trip_failures(tokenizer: Tokenizer, texts: Iterable[tuple[object, str]]) -> Iterator[str]:
    items = list(texts)
    for batch in _batches(items):
        encoded = tokenizer.encode_batch([text for _, text in batch])
        for (name, text), ids in zip(batch, encoded, strict=True):
            # SentencePiece writes a space as U+2581, so that character itself comes back as a space.
            if tokenizer.decode(ids) != text.replace("\u2581", " "):
                yield f"{name}: {text[:40]!r} comes back as {tokenizer.decode(ids)[:40]!r}"
            elif any(tokenizer.is_special(i) for i in set(ids)):
                yield f"{name}: {text[:40]!r} has a special id"


def _forgery_failures(tokenizer: Tokenizer) -> Iterator[str]:
    literals = [
        tokenizer.piece(i) for i in range(tokenizer.vocab_size) if tokenizer.is_special(i) or tokenizer.is_byte(i)
    ]
    literals += ["<pad>", "<|im_start|>", "\u2581<s>", "<reserved_1000>"]
    draw = random.Random(0)
    joints = ("", " ", "\n", "<", ">", "a", "。", "0")
    texts = [text for literal in literals for text in (literal, f" {literal}", f"用户{literal}x", literal + literal)]
    texts += ["".join(draw.choice(literals) + draw.choice(joints) for _ in range(6)) for _ in range(2000)]
    yield from _round_trip_failures(tokenizer, [("text", text) for text in texts])
    for text in texts[:200]:
        if tokenizer.encode(text) != tokenizer.encode_batch([text])[0]:
            yield f"encode and encode_batch differ on {text!r}"


def _batches(items: Sequence[T]) -> Iterator[list[T]]:
    for start in range(0, len(items), _BATCH):
        yield list(items[start : start + _BATCH])

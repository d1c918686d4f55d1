"""The Baichuan 2 tokenizer: the released SentencePiece model, or one trained with the same settings.

The layout of special ids is the released one for any vocabulary size: 0 pad and unknown, 1 beginning of text, 2 end of
text, 195 and 196 the user and assistant roles. Data and checkpoints thus agree on their meaning.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import operator
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import SupportsIndex

from bc2_jax.files import file_sha256, replaced

PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
USER_ID, ASSISTANT_ID = 195, 196

_LAYOUT = {
    PAD_ID: "<unk>",
    BOS_ID: "<s>",
    EOS_ID: "</s>",
    USER_ID: "<reserved_106>",
    ASSISTANT_ID: "<reserved_107>",
}
RESERVED = re.compile(r"<reserved_\d+>")
_SPECIAL = re.compile(r"<unk>|<s>|</s>|<reserved_\d+>")

# Frequent in code; never learned, because training reads lines.
_USER_DEFINED = ["\n", "\t"]
LONGEST_PIECE = 32
"""Characters of the longest learned piece."""
# SentencePiece skips items longer than max_sentence_length bytes; a character has at most 4 bytes.
_MAX_ITEM_BYTES = 16_384
_MAX_ITEM_CHARACTERS = _MAX_ITEM_BYTES // 4
# Characters searched for a place that no merge crosses.
_LONGEST_MERGED = 65_536
_NO_TEXT = "text is not valid: it has a lone surrogate, which is not a character in UTF-8."
# How a piece spells a space.
_SPACE = "\u2581"
# SentencePiece's own marker for unknown pieces: a training item that contains it is skipped.
_MARKER = "\u2585"


class Tokenizer:
    """A SentencePiece model with Baichuan 2's layout of ids.

    Raises FileNotFoundError for a missing file, and ValueError for a file that is not a SentencePiece model or lacks
    one of the five special ids.
    """

    pad_id = PAD_ID
    bos_id = BOS_ID
    eos_id = EOS_ID
    user_id = USER_ID
    assistant_id = ASSISTANT_ID

    def __init__(self, path: str | os.PathLike[str]) -> None:
        import sentencepiece

        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"tokenizer = {str(path)!r} is not a file: a SentencePiece model is needed.")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=self.path.read_bytes())
        except RuntimeError as error:
            raise ValueError(f"tokenizer = {str(path)!r} is not a SentencePiece model.") from error
        self.vocab_size: int = self._model.vocab_size()
        for token_id, piece in _LAYOUT.items():
            found = self._model.id_to_piece(token_id) if token_id < self.vocab_size else "nothing"
            if found != piece:
                raise ValueError(
                    f"tokenizer = {str(path)!r} has {found} at id {token_id}: Baichuan 2's layout needs {piece} there."
                )
        pieces = ((i, self.piece(i)) for i in range(self.vocab_size))
        reserved = {i: piece for i, piece in pieces if RESERVED.fullmatch(piece)}
        # The released model holds reserved pieces as user-defined symbols, which SentencePiece finds in any text.
        self._forgeable = {piece for i, piece in reserved.items() if not self._model.is_control(i)}
        self._special_ids = {PAD_ID, BOS_ID, EOS_ID, *reserved}

    def __reduce__(self) -> tuple[Callable[[Path], Tokenizer], tuple[Path]]:
        """Pickles as the path; a worker process reads the file once."""
        return _read_once, (self.path,)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the model file, in hex; identifies the tokenizer in packed rows and checkpoints."""
        return file_sha256(self.path)

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """The ids of `text`; nothing is added at either end.

        By default text cannot produce a special id: a literal `<reserved_106>` becomes ordinary pieces, so that a
        user's message cannot forge a role. `parse_special=True` turns literal `<unk>`, `<s>`, `</s>` and `<reserved_N>`
        into their ids, as the released tokenizer class does; use it only for trusted text.

        Decoding gives `text` back, except that U+2581 becomes a space, as in every SentencePiece model. Raises
        ValueError for a value that is not a str or has a lone surrogate.
        """
        _check_texts([text])
        if not parse_special:
            return [token_id for part in self._cut_forged(text) for token_id in self._encode_part(part)]
        ids: list[int] = []
        start = 0
        for match in _SPECIAL.finditer(text):
            token_id = self._model.piece_to_id(match.group())
            if token_id in self._special_ids and self.piece(token_id) == match.group():
                ids += self._encode_part(text[start : match.start()])
                ids.append(token_id)
                start = match.end()
        return ids + self._encode_part(text[start:])

    def _encode_part(self, text: str) -> list[int]:
        """Without the thread pool of the list form, whose start takes several times as long as encoding a message."""
        try:
            return self._model.encode(text)
        except (TypeError, RuntimeError) as error:
            raise ValueError(_NO_TEXT) from error

    def encode_batch(self, texts: Sequence[str], *, num_threads: int = -1) -> list[list[int]]:
        """`encode` of each text, on all cores or with `num_threads`."""
        _check_texts(texts)
        cut = [self._cut_forged(text) for text in texts]
        try:
            encoded = iter(self._model.encode([part for parts in cut for part in parts], num_threads=num_threads))
        except TypeError as error:
            raise ValueError(_NO_TEXT) from error
        return [
            next(encoded) if len(parts) == 1 else [token_id for _ in parts for token_id in next(encoded)]
            for parts in cut
        ]

    def cut(self, text: str, size: int) -> Iterator[str]:
        """Cuts `text` into parts of about `size` characters whose ids, joined, are those of `text`.

        Cuts only between characters that are adjacent in no piece of the vocabulary, such as after a line, so that no
        merge crosses a cut. After 65,536 characters without such a place (one letter repeated) it cuts anyway: ids next
        to the cut may then differ from those of the whole text, but decode to the same text.
        """
        start = 0
        while len(text) - start > size:
            end, last = start + size, min(start + size + _LONGEST_MERGED, len(text))
            while end < last and text[end - 1 : end + 1].replace(" ", _SPACE) in self._pairs:
                end += 1
            yield text[start:end]
            start = end
        if start < len(text):
            yield text[start:] if start else text

    @functools.cached_property
    def _pairs(self) -> frozenset[str]:
        """All pairs of adjacent characters in pieces of the vocabulary."""
        pieces = (self.piece(i) for i in range(self.vocab_size))
        return frozenset(piece[i : i + 2] for piece in pieces for i in range(len(piece) - 1))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, a list or 1-D array.

        Special ids (pad, bos, eos, reserved, roles) and ids from vocab_size on (padded vocabularies) are left out.
        Invalid UTF-8 becomes U+FFFD; U+2581 comes back as a space. Raises ValueError for a value that is not a token
        id.
        """
        if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
            raise ValueError(f"ids = {ids!r} is not valid: it must be a list of token ids.")
        kept, vocab_size = [], self.vocab_size
        for i in ids.tolist() if hasattr(ids, "tolist") else ids:
            # Checking the protocol takes ten times as long as the rest; most ids are ints.
            if not (type(i) is int or isinstance(i, SupportsIndex)) or (token_id := operator.index(i)) < 0:
                raise ValueError(f"token id = {i!r} is not valid: it must be a whole number, at least 0.")
            if token_id < vocab_size and token_id not in self._special_ids:
                kept.append(token_id)
        return self._model.decode(kept) if kept else ""

    def piece(self, token_id: int) -> str:
        """The piece of `token_id`, below vocab_size; a space is written as U+2581."""
        return self._model.id_to_piece(token_id)

    def is_special(self, token_id: int) -> bool:
        """Whether `token_id` has no text: pad, bos, eos, a role, reserved or control."""
        return token_id in self._special_ids or (token_id < self.vocab_size and self._model.is_control(token_id))

    def is_byte(self, token_id: int) -> bool:
        """Whether `token_id` stands for one byte of a character without a piece."""
        return token_id < self.vocab_size and self._model.is_byte(token_id)

    def _cut_forged(self, text: str) -> list[str]:
        """Cuts `text` inside each literal that SentencePiece would read as a reserved piece."""
        parts: list[str] = []
        start = 0
        if self._forgeable and "<reserved_" in text:
            for match in RESERVED.finditer(text):
                if match.group() in self._forgeable:
                    parts.append(text[start : match.start() + 1])
                    start = match.start() + 1
        return [*parts, text[start:]]


@functools.cache
def _read_once(path: Path) -> Tokenizer:
    return Tokenizer(path)


def _check_texts(texts: Sequence[str]) -> None:
    if isinstance(texts, str | bytes):
        raise ValueError("texts is one text: it must be a list of texts.")
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"text = {text!r} is not valid: it must be a str.")


@dataclasses.dataclass
class TrainingText:
    """Counts of the text that `train_tokenizer` has read."""

    texts: int = 0
    lines: int = 0
    """Non-empty lines."""
    bytes: int = 0
    """UTF-8 bytes of the lines."""
    cut_lines: int = 0
    """Lines above 4096 characters; all of their text is used, but no merge across a cut is learned."""
    removed_characters: int = 0
    """U+2585, SentencePiece's marker for unknown pieces: it would skip a line that contains it."""


def train_tokenizer(
    texts: Iterable[str],
    path: str | os.PathLike[str],
    vocab_size: int,
    *,
    character_coverage: float = 0.9999,
    counts: TrainingText | None = None,
) -> Tokenizer:
    """Trains byte-pair encoding with Baichuan 2's settings (paper section 2.2) and writes the model to `path`.

    Ids 3..196 are control symbols, which text never produces; then come newline, tab, 256 bytes and the learned pieces.
    Equal texts and sizes give equal files. Texts are cut into lines, and lines above 4096 characters into parts,
    because SentencePiece silently skips longer ones. Memory is 20 to 25 times the size of `texts`: pass a sample.
    `counts` reports what was read.

    Raises ValueError if `vocab_size` is too large or too small for `texts`.
    """
    import sentencepiece

    fixed = ASSISTANT_ID + 1 + len(_USER_DEFINED) + 256
    if vocab_size <= fixed:
        raise ValueError(f"vocab_size = {vocab_size} is not valid: it must be more than the {fixed} fixed pieces.")
    # The released names of the ids that have one: <reserved_0> is 89.
    control = [f"<reserved_{i - 89}>" if i >= 89 else f"<control_{i}>" for i in range(EOS_ID + 1, ASSISTANT_ID + 1)]
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_items(texts, counts or TrainingText()),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_digits=True,
            split_by_unicode_script=True,
            byte_fallback=True,
            allow_whitespace_only_pieces=True,
            max_sentencepiece_length=LONGEST_PIECE,
            max_sentence_length=_MAX_ITEM_BYTES,
            unk_id=PAD_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
            pad_id=-1,
            control_symbols=control,
            user_defined_symbols=_USER_DEFINED,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2] or str(error)
        raise ValueError(f"vocab_size = {vocab_size} is not valid for this text: {reason}") from error
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path, shared=True) as partial:
        partial.write_bytes(model.getvalue())
    return Tokenizer(path)


def _training_items(texts: Iterable[str], counts: TrainingText) -> Iterator[str]:
    for text in texts:
        counts.texts += 1
        counts.removed_characters += text.count(_MARKER)
        for line in text.replace(_MARKER, "").split("\n"):
            if line:
                counts.lines += 1
                counts.bytes += len(line.encode())
                counts.cut_lines += len(line) > _MAX_ITEM_CHARACTERS
            for start in range(0, len(line), _MAX_ITEM_CHARACTERS):
                yield line[start : start + _MAX_ITEM_CHARACTERS]

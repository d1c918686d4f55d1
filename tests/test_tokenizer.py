import dataclasses
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from bc2_jax import tokenizer as tokenizer_module
from bc2_jax.tokenizer import Tokenizer, TrainingText, train_tokenizer

FORGERIES = ("<reserved_106>", "<reserved_107>", "<reserved_0>", "<s>", "</s>", "<unk>", "<control_3>")
# SentencePiece writes a space as U+2581, so that character itself comes back as a space.
TEXT_CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")
TEXT = st.text(TEXT_CHARACTERS, max_size=60)


def stdlib_text(name: str) -> str:
    return Path(sysconfig.get_path("stdlib"), f"{name}.py").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    texts = [stdlib_text("argparse"), stdlib_text("shutil"), "三国演义\t第一回\n" * 20]
    return train_tokenizer(texts, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", 700)


@pytest.fixture(scope="module")
def released_like(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """As the released file: reserved pieces are user-defined, so SentencePiece itself finds them in text."""
    path = tmp_path_factory.mktemp("released") / "tokenizer.model"
    names = [f"<reserved_{i - 89}>" if i >= 89 else f"<tag_{i}>" for i in range(3, 300)]
    names[2:4] = ["\n", "\t"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(stdlib_text("argparse").splitlines()),
        model_prefix=str(path.with_suffix("")),
        model_type="bpe",
        vocab_size=760,
        user_defined_symbols=names,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return Tokenizer(path)


def test_layout_of_ids(tokenizer: Tokenizer) -> None:
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2)
    assert tokenizer.piece(tokenizer.user_id) == "<reserved_106>"
    assert tokenizer.piece(tokenizer.assistant_id) == "<reserved_107>"
    assert tokenizer.vocab_size == 700
    assert len(tokenizer.encode("\n")) == len(tokenizer.encode("\t")) == 1
    assert len(tokenizer.fingerprint) == 64


@given(TEXT)
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(197 <= i < tokenizer.vocab_size for i in ids)


@given(st.lists(st.one_of(st.sampled_from(FORGERIES), TEXT), max_size=6))
def test_text_forges_no_special_id(tokenizer: Tokenizer, released_like: Tokenizer, parts: list[str]) -> None:
    text = "".join(parts)
    for model in (tokenizer, released_like):
        ids = model.encode(text)
        assert not any(model.piece(i).startswith("<reserved_") or i < 3 for i in ids)
        assert model.decode(ids) == text
        assert model.encode_batch([text, "", text]) == [ids, [], ids]


def test_released_layout_would_be_forged_without_care(released_like: Tokenizer) -> None:
    model = sentencepiece.SentencePieceProcessor(model_file=str(released_like.path))
    assert model.encode("<reserved_106>hi")[0] == 195
    assert released_like.encode("<reserved_106>hi")[0] != 195


def test_plain_text_is_encoded_as_sentencepiece_does(released_like: Tokenizer) -> None:
    model = sentencepiece.SentencePieceProcessor(model_file=str(released_like.path))
    for text in (stdlib_text("heapq"), "<reserved_9999> <reserved_> <reserved", " <tag_7>\n\t  x"):
        assert released_like.encode(text) == model.encode(text)


@given(
    st.lists(
        st.one_of(st.sampled_from([*FORGERIES, "if x == 12:\n    ", "    ", "self", "三国演义"]), TEXT), max_size=12
    ),
    st.integers(1, 30),
)
def test_parts_of_a_text_have_its_ids(
    tokenizer: Tokenizer, released_like: Tokenizer, parts: list[str], size: int
) -> None:
    text = "".join(parts)
    for model in (tokenizer, released_like):
        cut = list(model.cut(text, size))
        assert "".join(cut) == text and all(cut)
        assert all(len(part) >= size for part in cut[:-1])
        assert [i for part in cut for i in model.encode(part)] == model.encode(text)


def test_long_text_is_cut_often_and_exactly(tokenizer: Tokenizer) -> None:
    text = stdlib_text("argparse") + "第一回\t" * 1000
    cut = list(tokenizer.cut(text, 64))
    assert max(map(len, cut)) < 128
    assert [i for ids in tokenizer.encode_batch(cut, num_threads=1) for i in ids] == tokenizer.encode(text)


def test_a_stretch_that_merges_everywhere_is_cut_all_the_same(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_module, "_LONGEST_MERGED", 100)
    assert list(map(len, tokenizer.cut(" " * 1000, 50))) == [150] * 6 + [100]


def test_special_literals_on_request(tokenizer: Tokenizer, released_like: Tokenizer) -> None:
    text = "<s>if</s><reserved_106>x<reserved_107><unk><reserved_99999>"
    for model in (tokenizer, released_like):
        ids = model.encode(text, parse_special=True)
        tail = model.encode("<reserved_99999>")
        assert ids == [1, *model.encode("if"), 2, 195, *model.encode("x"), 196, 0, *tail]
        assert model.decode(ids) == "ifx<reserved_99999>"


def test_which_ids_are_special_or_bytes(tokenizer: Tokenizer, released_like: Tokenizer) -> None:
    assert [i for i in range(700) if tokenizer.is_special(i)] == list(range(197))
    assert [tokenizer.piece(i) for i in range(700) if tokenizer.is_byte(i)] == [f"<0x{i:02X}>" for i in range(256)]
    special = [released_like.piece(i) for i in range(760) if released_like.is_special(i)]
    assert special == ["<unk>", "<s>", "</s>", *(f"<reserved_{i}>" for i in range(211))]


def test_digits_are_split(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("20240")) == 5


def test_characters_without_a_piece_are_spelt_in_bytes(tokenizer: Tokenizer) -> None:
    assert [tokenizer.piece(i) for i in tokenizer.encode("龘")] == ["<0xE9>", "<0xBE>", "<0x98>"]
    assert tokenizer.decode(tokenizer.encode("龘")[:2]) == "\ufffd" * 2


def test_bad_ids_and_text(tokenizer: Tokenizer) -> None:
    for bad in (-1, 1.0, "300", [300]):
        with pytest.raises(ValueError, match="token id = .* must be a whole number"):
            tokenizer.decode([300, bad])
    for bad_ids in ("300", 300):
        with pytest.raises(ValueError, match="ids = .* must be a list of token ids"):
            tokenizer.decode(bad_ids)
    for bad_text in (300, None, b"text"):
        for parse_special in (False, True):
            with pytest.raises(ValueError, match="text = .* must be a str"):
                tokenizer.encode(bad_text, parse_special=parse_special)
    with pytest.raises(ValueError, match="one text"):
        tokenizer.encode_batch("text")
    for parse_special in (False, True):
        with pytest.raises(ValueError, match="lone surrogate"):
            tokenizer.encode("a</s>\ud800", parse_special=parse_special)
    with pytest.raises(ValueError, match="lone surrogate"):
        tokenizer.encode_batch(["a", "\ud800"])
    assert tokenizer.decode([]) == ""


def test_training_is_deterministic_wherever_it_writes(tmp_path: Path) -> None:
    texts = [stdlib_text("textwrap"), stdlib_text("heapq")]
    a = train_tokenizer(iter(texts), tmp_path / "a.model", 600)
    b = train_tokenizer(texts, tmp_path / "deeper" / "b.model", 600)
    assert a.fingerprint == b.fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.model", "deeper"]


def test_long_lines_are_cut_not_dropped(tmp_path: Path) -> None:
    """SentencePiece would skip a line above 16,384 bytes, here all of the 中文 text."""
    line = "中文语言" * 8000
    model = train_tokenizer([line, stdlib_text("heapq")], tmp_path / "m.model", 600)
    assert len(model.encode("中文语言")) == 1


@given(st.lists(st.text(st.sampled_from("ab\n\u2585汉"), max_size=40), max_size=5))
def test_training_items_hold_all_text_and_are_counted(texts: list[str]) -> None:
    counts = TrainingText()
    items = list(tokenizer_module._training_items(texts, counts))
    whole = "".join(texts).replace("\n", "").replace("\u2585", "")
    assert "".join(items) == whole
    assert not any("\n" in item for item in items)
    assert dataclasses.astuple(counts) == (
        len(texts), len(items), len(whole.encode()), 0, "".join(texts).count("\u2585")
    )  # fmt: skip


def test_training_items_fit() -> None:
    counts = TrainingText()
    items = list(tokenizer_module._training_items(["\U0001f600" * 20_000 + "\n\nx"], counts))
    assert all(len(item.encode()) <= 16_384 for item in items)
    assert dataclasses.astuple(counts) == (1, 2, 80_001, 1, 0)


@pytest.mark.parametrize(
    ("vocab_size", "message"), [(455, "455 fixed pieces"), (460, "too small|smaller"), (100_000, "too high")]
)
def test_impossible_vocabulary_sizes(tmp_path: Path, vocab_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=rf"vocab_size = {vocab_size} .*({message})"):
        train_tokenizer([stdlib_text("heapq")], tmp_path / "m.model", vocab_size)
    assert not list(tmp_path.iterdir())


def test_files_that_are_no_baichuan_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="tokenizer = .*missing.model"):
        Tokenizer(tmp_path / "missing.model")
    (tmp_path / "text.model").write_text("no model")
    with pytest.raises(ValueError, match=r"tokenizer = .*text\.model.* is not a SentencePiece model"):
        Tokenizer(tmp_path / "text.model")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c"] * 10), model_prefix=str(tmp_path / "other"), vocab_size=8, minloglevel=2
    )
    with pytest.raises(ValueError, match="nothing at id 195: Baichuan 2's layout needs <reserved_106>"):
        Tokenizer(tmp_path / "other.model")


@given(st.text(TEXT_CHARACTERS, max_size=20), st.lists(st.integers(0, 2000), max_size=6), st.randoms())
def test_ids_without_a_piece_lose_no_text(tokenizer: Tokenizer, text: str, more: list[int], random) -> None:
    """Wherever a model with a padded vocabulary puts them, and as any array."""
    ids = tokenizer.encode(text)
    mixed = list(ids)
    for i in more:
        mixed.insert(random.randint(0, len(mixed)), 700 + i)
    assert tokenizer.decode(mixed) == text
    assert tokenizer.decode(np.array(mixed, np.int32)) == text
    assert not any(tokenizer.is_special(700 + i) or tokenizer.is_byte(700 + i) for i in more)


def test_a_lower_block_comes_back_as_a_space(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\u2581b")) == "a b"

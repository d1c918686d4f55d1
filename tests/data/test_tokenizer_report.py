import base64
from pathlib import Path

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from bc2_jax.data.tokenizer_report import check_tokenizer, measure_compression, open_encoder
from bc2_jax.tokenizer import Tokenizer
from tests.data.few_code_points import take_few

CONTROL = [f"<reserved_{i - 89}>" if i >= 89 else f"<control_{i}>" for i in range(3, 197)]
TEXTS = ["def f(x):\n    return x\n", "一二三 and 456"]


def failures(tokenizer: Tokenizer, vocab_size: int) -> dict[str, str]:
    return {check.name: check.failure for check in check_tokenizer(tokenizer, vocab_size, TEXTS) if check.failure}


def test_our_tokenizer_keeps_its_promises(tokenizer: Tokenizer) -> None:
    """On every code point."""
    checks = check_tokenizer(tokenizer, 640, TEXTS)
    assert len(checks) == 8 and not any(check.failure for check in checks)


@pytest.mark.parametrize(
    ("setting", "names"),
    [
        ({"vocab_size": 639}, ["640 pieces"]),
        (
            {"byte_fallback": False},
            ["256 bytes", "2 held-out documents", "every code point", "hard strings", "text can't"],
        ),
        ({"split_digits": False}, ["digits"]),
        ({"max_sentencepiece_length": 60}, ["no piece is longer than 32"]),
        ({"normalization_rule_name": "nfkc"}, ["every code point", "hard strings"]),
        ({"remove_extra_whitespaces": True}, ["2 held-out documents", "hard strings", "text can't"]),
    ],
)
def test_each_check_can_fail(
    modules: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: dict, names: list[str]
) -> None:
    take_few(monkeypatch.setattr)
    settings = {
        "model_type": "bpe", "vocab_size": 640, "normalization_rule_name": "identity", "add_dummy_prefix": False,
        "remove_extra_whitespaces": False, "split_digits": True, "byte_fallback": True, "max_sentencepiece_length": 32,
        "allow_whitespace_only_pieces": True, "unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1, "minloglevel": 2,
        "control_symbols": CONTROL, "user_defined_symbols": ["\n", "\t"], **setting,
    }  # fmt: skip
    lines = [line for text in modules for line in text.split("\n") if line] + ["2024 2024"] * 500 + ["-" * 60] * 500
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(tmp_path / "broken"), **settings
    )
    found = failures(Tokenizer(tmp_path / "broken.model"), 640)
    assert len(found) == len(names) and all(map(str.startswith, found, names)), found


def test_a_forged_id_is_noticed(
    tokenizer: Tokenizer, modules: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the released model the last role is user-defined, so SentencePiece itself finds it in text."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.path.read_bytes())
    proto.pieces[196].type = proto.pieces[197].type
    take_few(monkeypatch.setattr)
    (tmp_path / "released.model").write_bytes(proto.SerializeToString())
    released = Tokenizer(tmp_path / "released.model")
    assert failures(released, 640) == {}
    monkeypatch.setattr(Tokenizer, "_cut_forged", lambda self, text: [text])
    assert list(failures(released, 640)) == ["text can't forge a special id"]


def test_compression_counts(tokenizer: Tokenizer) -> None:
    held_out = {"code": TEXTS[:1] * 300, "zh": TEXTS[1:]}
    code, zh, together = measure_compression("ours", tokenizer.encode_batch, held_out)
    assert (code.tokenizer, code.language, zh.language, together.language) == ("ours", "code", "zh", "all")
    assert (code.documents, code.characters, code.bytes) == (300, 300 * len(TEXTS[0]), 300 * len(TEXTS[0]))
    assert code.tokens == 300 * len(tokenizer.encode(TEXTS[0])) and zh.tokens == len(tokenizer.encode(TEXTS[1]))
    assert (zh.characters, zh.bytes) == (11, 17)
    assert zh.tokens_per_character == zh.tokens / 11 and zh.tokens_per_byte == zh.tokens / 17
    assert together.tokens == code.tokens + zh.tokens and together.bytes == code.bytes + 17


def test_other_tokenizers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert open_encoder(str(tokenizer.path))(TEXTS) == tokenizer.encode_batch(TEXTS)
    (tmp_path / "text.model").write_text("no model")
    for name, kind in ((tmp_path / "gone.model", FileNotFoundError), (tmp_path / "text.model", ValueError)):
        with pytest.raises(
            kind, match="--compare = .* is not valid: it must be a SentencePiece model, a tokenizer.json or"
        ):
            open_encoder(str(name))


def test_tokenizer_json(tmp_path: Path) -> None:
    import tokenizers

    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "a": 1, "b": 2, "[CLS]": 3}, "[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.post_processor = tokenizers.processors.TemplateProcessing("[CLS] $A", special_tokens=[("[CLS]", 3)])
    model.save(str(tmp_path / "tokenizer.json"))
    assert open_encoder(str(tmp_path / "tokenizer.json"))(["a b", "b c a"]) == [[1, 2], [2, 0, 1]]  # no [CLS]
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="other.json' is not valid: it is not a tokenizer.json"):
        open_encoder(str(tmp_path / "other.json"))


def test_tiktoken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoding of all bytes and "th", "the": what its merges do is known."""
    pieces = [*(bytes([value]) for value in range(256)), b"th", b"the"]
    file = tmp_path / "tiny.tiktoken"
    file.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(piece), rank) for rank, piece in enumerate(pieces)))
    encode = open_encoder(f"tiktoken:{file}")
    assert encode(["the th", "汉<|endoftext|>"]) == [[257, 32, 256], [*"汉<|endoftext|>".encode()]]
    # No network: the proxy refuses.
    for scheme in ("http", "https"):
        monkeypatch.setenv(f"{scheme}_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"'tiktoken:r50k_base' can't be loaded \(ProxyError: .*TIKTOKEN_CACHE_DIR"):
        open_encoder("tiktoken:r50k_base")
    with pytest.raises(ValueError, match=r"'tiktoken:nonsense' can't be loaded \(ValueError: Unknown encoding"):
        open_encoder("tiktoken:nonsense")

"""Compares llama.cpp on our GGUF files with our own model: logits, greedy tokens and token ids.

python benchmarks/llama_cpp_parity.py [--model HF_DIR_OR_CHECKPOINT] [--tokenizer tokenizer.model] [--length 40]

Needs `pip install -e '.[gguf]' llama-cpp-python`, which builds llama.cpp. Without --model it makes narrow random
models: RoPE with 32 layers, ALiBi with 40 layers and 4 heads, ALiBi with 40 layers and 6 heads (slopes that are not
powers of two), with a tokenizer trained on the standard library unless one is given. Our side is fp32; llama.cpp
rounds the weights and, in each matmul, the activations to the file's type. Our own bf16 result shows how much such
rounding matters.
"""

from __future__ import annotations

import argparse
import sysconfig
import tempfile
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import numpy as np

import bc2_jax
from bc2_jax.config import ModelConfig
from bc2_jax.convert.conversion import to_gguf
from bc2_jax.convert.gguf import GGUF_TYPES
from bc2_jax.convert.hf_write import save_folder
from bc2_jax.convert.table import param_shapes, unflatten
from bc2_jax.tokenizer import Tokenizer, train_tokenizer

Scheme = Literal["rope", "alibi"]
GREEDY = 24
TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "话说天下大势，分久必合，合久必分。",
    "def f(x):\n\tif x > 10:\n\t\treturn  x ** 2\n\n    return None\n",
    "  two spaces  in front,  between and behind  ",
    "\n\n\t\t\r\n 3.14159 2026-01-31 1,000,000",
    "naïve café 😀 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ㍿ \u200b ▁ ﬁ Å",
    "a--->b <!-- c --> d....e 。。。。 <br/><p>",
    "<s>user</s> <unk> <reserved_106>你好<reserved_107>",
)


def make_model(folder: Path, tokenizer: Tokenizer, scheme: Scheme, layers: int, heads: int) -> None:
    """A random model whose attention is far from even, so that a wrong position shows."""
    config = ModelConfig(
        hidden_size=32 * heads, intermediate_size=96 * heads, num_hidden_layers=layers, num_attention_heads=heads,
        position_embedding=scheme, vocab_size=tokenizer.vocab_size, model_max_length=2048,
    )  # fmt: skip
    rng = np.random.default_rng(layers + heads)
    params = {}
    for path, shape in param_shapes(config).items():
        array = rng.standard_normal(shape, np.float32)
        if "norm" in path:
            array = 1 + 0.2 * array
        elif path not in ("embed_tokens.weight", "lm_head.weight"):
            fan_in = config.intermediate_size if "down_proj" in path else config.hidden_size
            array *= (1.5 if "q_proj" in path or "k_proj" in path else 1) / np.sqrt(fan_in)
        params[path] = array
    save_folder(unflatten(params), config, folder, "float32", tokenizer_path=tokenizer.path)


def compare(folder: Path, work: Path, length: int) -> None:
    from llama_cpp import Llama

    model, tokenizer = bc2_jax.load_pretrained(folder), Tokenizer(bc2_jax.find_tokenizer(folder))
    prompt = tokenizer.encode("".join(TEXTS[:5]) * (1 + length // 40))[:length]
    ours = np.asarray(model(jnp.array([prompt])))[0]
    greedy = bc2_jax.generate(model, [prompt], max_new_tokens=GREEDY, temperature=0, repetition_penalty=1)[0]
    print(f"{folder.name}: {len(prompt)} tokens, standard deviation of our logits {ours.std():.3f}")
    in_bf16 = np.abs(np.asarray(bc2_jax.load_pretrained(folder, dtype="bfloat16")(jnp.array([prompt])))[0] - ours)
    print(f"  ours in bf16 max |d| {in_bf16.max():.5f}  mean {in_bf16.mean():.6f}")
    for kind in GGUF_TYPES:
        file = work / f"{folder.name}-{kind}.gguf"
        to_gguf(folder, file, kind=kind)
        for flash in (False, True):
            engine = Llama(
                str(file), n_ctx=length + GREEDY + 8, n_batch=length, logits_all=True, verbose=False, flash_attn=flash
            )
            engine.eval(prompt)
            theirs = engine.scores[: len(prompt)].copy()
            tokens: list[int] = []
            while len(tokens) < len(greedy):
                tokens.append(int(np.argmax(engine.scores[engine.n_tokens - 1])))
                engine.eval(tokens[-1:])
            difference = np.abs(theirs - ours)
            top1, same = np.mean(theirs.argmax(1) == ours.argmax(1)), int(np.cumprod(np.equal(tokens, greedy)).sum())
            print(
                f"  {kind:5}{'flash' if flash else '':7} max |d| {difference.max():.5f}  mean {difference.mean():.6f}"
                f"  top-1 {top1:.1%}  greedy {same} of {len(greedy)}"
            )
    for text in TEXTS:
        for special in (False, True):
            ids = engine.tokenize(text.encode(), add_bos=False, special=special)
            expected = tokenizer.encode(text, parse_special=special)
            if ids != expected:
                print(f"  other ids for {text!r}, special={special}:\n    llama.cpp {ids}\n    ours      {expected}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--length", type=int, default=40)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        if args.model is not None:
            return compare(args.model, work, args.length)
        texts = [p.read_text(encoding="utf-8") for p in sorted(Path(sysconfig.get_path("stdlib")).glob("a*.py"))]
        tokenizer = Tokenizer(args.tokenizer) if args.tokenizer else train_tokenizer(texts, work / "spm.model", 1024)
        models: tuple[tuple[Scheme, int, int], ...] = (("rope", 32, 4), ("alibi", 40, 4), ("alibi", 40, 6))
        for scheme, layers, heads in models:
            folder = work / f"{scheme}-{heads}-heads"
            make_model(folder, tokenizer, scheme, layers, heads)
            compare(folder, work, args.length)


if __name__ == "__main__":
    main()

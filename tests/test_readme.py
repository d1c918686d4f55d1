"""The Python of the README runs as printed, and the Chinese README says the same."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from bc2_jax.config import ModelConfig
from bc2_jax.tokenizer import Tokenizer
from tests.convert.models import random_folder

ROOT = Path(__file__).parents[1]


def test_the_snippets_run_as_printed(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """In a folder where a small random model has the name of the release."""
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert snippets
    config = ModelConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, position_embedding="rope",
        vocab_size=tokenizer.vocab_size + 64, model_max_length=512,
    )  # fmt: skip
    folder = random_folder(tmp_path / "Baichuan2-7B-Base", config, "bfloat16")
    (folder / "tokenizer.model").write_bytes(tokenizer.path.read_bytes())
    check = "\nprint(list(map(type, texts)), len(tokens), logits.dtype, logits.shape)\n"
    for snippet in snippets:
        done = subprocess.run(
            [sys.executable, "-c", snippet + check], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True, encoding="utf-8",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        length = len(tokenizer.encode("登鹳雀楼->王之涣\n夜雨寄北->"))
        assert done.stdout == f"[<class 'str'>, <class 'str'>] 2 float32 (1, {length}, {config.vocab_size})\n"


def test_both_readmes_have_the_same_commands_and_figures() -> None:
    """What is the same in every language: commands without their comments, links, and the numbers of the results."""

    def parts(name: str) -> tuple[list[str], list[str], list[str]]:
        text = (ROOT / name).read_text(encoding="utf-8")
        blocks = [re.sub(r" *#.*", "", block) for block in re.findall(r"```(?:\w*)\n(.*?)```", text, re.DOTALL)]
        links = re.findall(r"\]\((?!README)([^)]+)\)", text)
        results = [row for row in re.findall(r"^\|.*\|$", text, re.MULTILINE) if "docs/" in row or "#what" in row]
        return blocks, links, [sorted(re.findall(r"\d[\d.,e-]*\d|\d", row)) for row in results]

    assert parts("README.md") == parts("README.zh-CN.md")

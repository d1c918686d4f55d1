"""A model trained on files changes what curation keeps."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from bc2_jax.cli.train_quality import main
from bc2_jax.curate.config import CurationConfig, QualityConfig
from bc2_jax.curate.engine import Engine
from bc2_jax.curate.pipeline import curate

ENGINE = Engine("native")


def write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def test_what_the_model_learned_is_dropped(tmp_path, modules, capsys):
    from pydoc_data.topics import topics

    prose = [topics[name] for name in sorted(topics)]
    lines = [line for module in modules for line in module.split("\n\n\n") if len(line) > 200]
    good, bad = write(tmp_path / "good.jsonl", prose[::2]), write(tmp_path / "bad.jsonl", lines[::2])
    model = tmp_path / "quality.npz"
    assert main(["--good", good, "--bad", bad, "--out", str(model)]) == 0
    assert "a good one has a higher score than a bad one" in capsys.readouterr().err
    raw = write(tmp_path / "raw.jsonl", prose[1::2] + lines[1::2])
    config = CurationConfig(quality=QualityConfig(model=str(model), min_score=0.5))
    report = curate([raw], str(tmp_path / "out"), config, ENGINE, lambda *_: None)
    dropped = {line["step"]: line["documents"] for line in report["waterfall"]}["quality"]
    kept = [row for file in (tmp_path / "out" / "documents").iterdir() for row in pq.read_table(file).to_pylist()]
    assert min(row["score"] for row in kept) >= 0.5
    right = sum(row["text"] in {text.strip() for text in prose} or "\n\n" in row["text"] for row in kept)
    assert dropped > 0.5 * len(lines[1::2]) and right > 0.5 * len(kept)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"--out": "x.txt"}, "--out = 'x.txt' is not valid: it must end with .npz."),
        ({"--good": "missing"}, "paths = 'missing' is not valid: there is no such file or folder."),
        ({"--most": "0"}, "--most = 0 is not valid: it must be positive."),
    ],
)
def test_one_sentence_for_what_is_not_valid(tmp_path, capsys, change, message):
    text = write(tmp_path / "a.jsonl", ["some text"])
    options = {"--good": text, "--bad": text, "--out": str(tmp_path / "m.npz")} | change
    assert main([part for option in options.items() for part in option]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*.npz"))

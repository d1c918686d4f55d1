"""The dense stage cut into many tasks, or stopped among them, gives the bytes of few tasks."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bc2_jax.curate import dense, dense_pairs
from bc2_jax.curate.config import ClusterConfig, CurationConfig, DenseConfig
from bc2_jax.curate.dense_pairs import near_duplicates
from bc2_jax.curate.engine import Engine
from bc2_jax.curate.features import unit_rows
from bc2_jax.curate.pipeline import curate
from bc2_jax.files import file_sha256
from tests.curate.test_pipeline import document, edited

ENGINE = Engine("native")


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 4))
def test_parts_together_are_the_whole(seed: int, documents: int, parts: int):
    rng = np.random.default_rng(seed)
    features, clusters = unit_rows(rng.standard_normal((documents, 4))), rng.integers(0, 3, (documents, 1), np.int32)
    config = DenseConfig(cosine=0.3, jaccard=0.0, most_earlier=documents)

    def pairs(part: int, parts: int) -> list[tuple[int, int]]:
        found = near_duplicates(features, clusters, lambda i, j: np.ones(len(i)), config, part, parts)
        return list(zip(found.first.tolist(), found.second.tolist(), strict=True))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense_pairs, "_BLOCK", 5)
        every = [pair for part in range(parts) for pair in pairs(part, parts)]
        assert sorted(every) == pairs(0, 1)


@given(st.lists(st.integers(0, 300), min_size=1, max_size=40))
def test_every_cluster_is_compared_once(sizes: list[int]):
    """Ranges of clusters follow each other; a range of several clusters is within the limit; all parts are there."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"_FEWEST_COMPARED": 100, "_MOST_COMPARED": 120}.items():
            patch.setattr(dense, name, value)
        tasks = [tuple(map(int, name.split("-"))) for name in dense._plan(np.array(sizes))]
    ranges = list(dict.fromkeys((first, last) for first, last, *_ in tasks))
    assert [c for first, last in ranges for c in range(first, last + 1)] == list(range(len(sizes)))
    for first, last in ranges:
        held = sum(sizes[first : last + 1])
        assert first == last or held <= 100 or sum(1 for size in sizes[first : last + 1] if size) == 1
        parts = [(part, count) for a, b, part, count in tasks if (a, b) == (first, last)]
        count = max(1, -(-held // 120))
        assert parts == [(part, count) for part in range(count)]


def test_many_tasks_and_a_stop_among_them_give_the_same_bytes(tmp_path: Path, monkeypatch):
    raw = tmp_path / "raw"
    raw.mkdir()
    texts = [document(i, 60) for i in range(60)] + [edited(document(i, 60), i, 0.03) for i in range(30)]
    for number in range(0, len(texts), 15):
        lines = [
            json.dumps({"id": f"{number}-{i}", "text": text}) for i, text in enumerate(texts[number : number + 15])
        ]
        (raw / f"{number}.jsonl").write_text("\n".join(lines))
    config = CurationConfig(clusters=ClusterConfig(clusters=6))

    def run(name: str) -> dict[str, str]:
        curate([str(raw)], str(tmp_path / name), config, ENGINE, lambda *_: None)
        files = [*(tmp_path / name / "documents").iterdir(), *(tmp_path / name / "removed").iterdir()]
        return {str(file.relative_to(tmp_path / name)): file_sha256(file) for file in files}

    few = run("few")
    for field, value in {"_FEWEST_BATCH": 20, "_MOST_BATCH": 20, "_FEWEST_COMPARED": 20, "_MOST_COMPARED": 16}.items():
        monkeypatch.setattr(dense, field, value)
    calls = itertools.count()
    compare = dense._compare

    def stopping(*arguments):
        if next(calls) == 2:
            raise OSError("stopped")
        return compare(*arguments)

    monkeypatch.setattr(dense, "_compare", stopping)
    with pytest.raises(Exception, match="stopped"):
        run("many")
    results = tmp_path / "many" / "work" / "dense" / "results"
    finished = {file.name: file.stat().st_mtime_ns for file in results.iterdir()}
    assert len(list(results.glob("*-assigned.json"))) > 3
    assert run("many") == few
    assert {name: (results / name).stat().st_mtime_ns for name in finished} == finished  # not done again
    assert len(list(results.glob("*-pairs.json"))) > 6

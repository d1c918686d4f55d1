import collections
import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bc2_jax.config import DataConfig, MixtureStage, SourceConfig
from bc2_jax.data.batch import row_to_example
from bc2_jax.data.corpus import list_parts, load_corpus
from bc2_jax.data.loader import (
    describe_mixture,
    make_train_iterator,
    make_train_loader,
    make_validation_batches,
)
from bc2_jax.data.packing import load_manifest, read_rows
from bc2_jax.data.tokenization import Settings, tokenize_corpus
from bc2_jax.tokenizer import Tokenizer, train_tokenizer
from tests.packed_rows import pack_texts

T = 32
KEYS = {"input_ids", "labels", "segment_ids", "positions"}


@pytest.fixture(scope="module")
def data(tokenizer: Tokenizer, modules: list[str], tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Two sources, 3 to 1, with some held-out rows each."""
    folder = tmp_path_factory.mktemp("rows")
    parts = [text[start : start + 700] for text in modules for start in range(0, 21_000, 700)]
    for name, texts in (("a", parts[::2]), ("b", parts[1::2])):
        pack_texts(filter(None, texts), tokenizer, folder / name, T, validation_fraction=0.1, rows_per_file=300)
    return DataConfig(
        sources=(SourceConfig(path=str(folder / "a"), weight=3.0), SourceConfig(path=str(folder / "b"))),
        tokenizer=str(tokenizer.path),
        sequence_length=T,
        global_batch_size=12,
        seed=7,
    )


def train_loader(data: DataConfig, index: int = 0, count: int = 1):
    return make_train_loader(data, process_index=index, process_count=count)


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys() == KEYS
    for key in KEYS:
        np.testing.assert_array_equal(a[key], b[key])


def test_batches_have_the_promised_shapes(data: DataConfig) -> None:
    batch = train_loader(data, 1, 3)[5]
    assert batch.keys() == KEYS
    assert all(value.shape == (4, T) and value.dtype == np.int32 for value in batch.values())


def test_rows_come_from_the_files(data: DataConfig) -> None:
    known = {row[:-1].tobytes() for source in data.sources for row in read_rows(source.path, "train")}
    batch = train_loader(data)[3]
    assert all(row.astype(np.uint32).tobytes() in known for row in batch["input_ids"])


@pytest.mark.parametrize("count", [2, 3, 4, 6, 12])
def test_global_batch_is_the_same_for_every_process_count(data: DataConfig, count: int) -> None:
    whole = train_loader(data)
    parts = [train_loader(data, index, count) for index in range(count)]
    for step in (0, 1, 17, 10_000):
        joined = {key: np.concatenate([part[step][key] for part in parts]) for key in KEYS}
        assert_same(joined, whole[step])


def test_each_epoch_has_every_row_once_in_a_new_order(data: DataConfig) -> None:
    source = dataclasses.replace(data.sources[0])
    rows = read_rows(source.path, "train")[:, :-1]
    loader = train_loader(dataclasses.replace(data, sources=(source,), global_batch_size=1))
    epochs = [
        [loader[epoch * len(rows) + step]["input_ids"][0].tobytes() for step in range(len(rows))] for epoch in range(3)
    ]
    expected = sorted(row.astype(np.int32).tobytes() for row in rows)
    assert all(sorted(epoch) == expected for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != [row.astype(np.int32).tobytes() for row in rows]


def test_sources_are_mixed_by_weight_over_rows(data: DataConfig) -> None:
    first = {row[:-1].astype(np.int32).tobytes() for row in read_rows(data.sources[0].path, "train")}
    second = {row[:-1].astype(np.int32).tobytes() for row in read_rows(data.sources[1].path, "train")}
    loader = train_loader(data)
    drawn = [row.tobytes() for step in range(25) for row in loader[step]["input_ids"]]
    certain = [row for row in drawn if (row in first) != (row in second)]  # code repeats itself now and then
    assert len(certain) > 0.98 * len(drawn)
    assert abs(sum(row in first for row in certain) / len(certain) - 0.75) < 0.01


def test_shares_survive_weights_that_are_no_binary_fractions(data: DataConfig) -> None:
    a, b = data.sources
    weights = (dataclasses.replace(a, weight=0.1 + 0.2), dataclasses.replace(b, weight=0.1))
    assert_same(train_loader(dataclasses.replace(data, sources=weights))[9], train_loader(data)[9])


def test_sources_are_shuffled_independently(data: DataConfig) -> None:
    source = data.sources[0]
    loader = train_loader(dataclasses.replace(data, sources=(source, source), global_batch_size=2))
    pairs = [loader[step]["input_ids"] for step in range(50)]
    assert sum(np.array_equal(a, b) for a, b in pairs) < 5


def test_seed_changes_the_order(data: DataConfig) -> None:
    other = train_loader(dataclasses.replace(data, seed=8))
    assert not np.array_equal(other[0]["input_ids"], train_loader(data)[0]["input_ids"])
    assert_same(train_loader(data)[4], train_loader(dataclasses.replace(data))[4])


@pytest.mark.parametrize("read_ahead", [0, 1, 3])
def test_iterator_resumes_exactly_from_json(data: DataConfig, read_ahead: int) -> None:
    loader = train_loader(data)
    iterator = make_train_iterator(loader, read_ahead=read_ahead)
    for step in range(6):
        assert_same(next(iterator), loader[step])
    state = json.loads(json.dumps(iterator.get_state()))
    assert state == {"next_index": 6}
    next(iterator)
    resumed = make_train_iterator(train_loader(data), read_ahead=read_ahead)
    next(resumed)
    for target in (resumed, iterator):
        target.set_state(state)
        for step in (6, 7, 8):
            assert_same(next(target), loader[step])
        target.close()


def test_state_of_one_process_resumes_on_two(data: DataConfig) -> None:
    iterator = make_train_iterator(train_loader(data))
    for _ in range(3):
        next(iterator)
    state = iterator.get_state()
    halves = [make_train_iterator(train_loader(data, index, 2)) for index in range(2)]
    for half in halves:
        half.set_state(state)
    expected = next(iterator)
    parts = [next(half) for half in halves]
    assert_same({key: np.concatenate([part[key] for part in parts]) for key in KEYS}, expected)


@pytest.mark.parametrize("count", [1, 2])
def test_validation_is_every_held_out_row_once_in_order(data: DataConfig, count: int) -> None:
    rows = np.concatenate([read_rows(source.path, "validation") for source in data.sources])
    expected = row_to_example(rows)
    parts = [make_validation_batches(data, 8, process_index=index, process_count=count) for index in range(count)]
    assert {len(part) for part in parts} == {-(-len(rows) // 8)}
    batches = [{key: np.concatenate([part[i][key] for part in parts]) for key in KEYS} for i in range(len(parts[0]))]
    assert all(batch[key].shape == (8, T) for batch in batches for key in KEYS)
    joined = {key: np.concatenate([batch[key] for batch in batches]) for key in KEYS}
    assert_same({key: joined[key][: len(rows)] for key in KEYS}, expected)
    assert (joined["labels"][len(rows) :] == -100).all() and (joined["segment_ids"][len(rows) :] == 0).all()


# ------------------------------------------------------------------------------------------------ parts and mixtures


@pytest.fixture(scope="module")
def corpus(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources a and b in four buckets each, of random numbers, so that no two rows are the same."""
    random = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("corpus")
    with (folder / "a.jsonl").open("w") as file:
        for index in range(200):
            text = " ".join(map(str, random.integers(10**9, size=12)))
            weight = 1 + (index % 10 > 4)  # one for each bucket, so a bucket is one part
            record = {"text": text, "source": "ab"[index % 3 == 0], "score": index % 10 / 10, "weight": weight}
            file.write(json.dumps(record) + "\n")
    settings = Settings(sequence_length=T, validation_fraction=0.1, rows_per_file=40)
    tokenize_corpus([folder / "a.jsonl"], tokenizer.path, folder / "rows", settings)
    return folder / "rows"


def mixed(corpus: Path, tokenizer: Tokenizer, *sources: dict, **changes) -> DataConfig:
    fields = {"tokenizer": str(tokenizer.path), "sequence_length": T, "global_batch_size": 8, "seed": 3} | changes
    made = tuple(SourceConfig(**(source | {"path": str(corpus / source["path"])})) for source in sources)
    return DataConfig(sources=made, **fields)


def keys(path: Path, split: str = "train") -> list[bytes]:
    return [row[:-1].astype(np.int32).tobytes() for row in read_rows(path, split)]


def drawn(data: DataConfig, steps: range) -> list[bytes]:
    loader = train_loader(data)
    return [row.tobytes() for step in steps for row in loader[step]["input_ids"]]


def test_a_corpus_is_read_by_rows_times_weight(corpus: Path, tokenizer: Tokenizer) -> None:
    data = mixed(corpus, tokenizer, {"path": "."})
    parts = load_corpus(corpus).parts
    expected = np.array([part.rows * part.mean_weight for part in parts])
    uses = describe_mixture(data, 4000)
    assert [use.path for use in uses] == [str(corpus / part.path) for part in parts]
    np.testing.assert_allclose([use.shares[0] for use in uses], expected / expected.sum())
    # A row has the weight of the documents of its part.
    epochs = np.array([use.epochs for use in uses])
    np.testing.assert_allclose(epochs / [part.mean_weight for part in parts], 4000 / expected.sum(), rtol=0.1)
    seen = collections.Counter(drawn(data, range(500)))
    for part, use in zip(parts, uses, strict=True):
        assert sum(seen[key] for key in keys(corpus / part.path)) == use.rows_read
    assert sum(seen.values()) == sum(use.rows_read for use in uses) == 4000


@pytest.mark.parametrize("window", [range(0, 250), range(731, 981)])
def test_tokens_of_sources_are_the_weights_times_those_of_quality(
    corpus: Path, tokenizer: Tokenizer, window: range
) -> None:
    quality = (0.0, 1.0, 2.0, 1.0)
    data = mixed(corpus, tokenizer, {"path": "a", "weight": 0.3, "quality_weights": quality},
                 {"path": "b", "weight": 0.7})  # fmt: skip
    seen = collections.Counter(drawn(data, window))
    total = 8 * len(window)
    for source, weight, factors in (("a", 0.3, quality), ("b", 0.7, (1, 1, 1, 1))):
        parts = [part for part in load_corpus(corpus).parts if part.source == source]
        shares = np.array([part.rows * part.mean_weight * factors[part.bucket] for part in parts])
        read = [sum(seen[key] for key in keys(corpus / part.path)) for part in parts]
        assert abs(sum(read) - weight * total) <= 5  # 8 parts: (8 + 1) / 2
        np.testing.assert_allclose(read, weight * total * shares / shares.sum(), atol=9)


def test_each_epoch_of_a_part_has_every_row_once(corpus: Path, tokenizer: Tokenizer) -> None:
    part = corpus / "a" / "q3"
    rows = keys(part)
    data = mixed(corpus, tokenizer, {"path": "a", "weight": 2}, {"path": "b/q0"}, global_batch_size=1)
    order = [key for key in drawn(data, range(20 * len(rows))) if key in set(rows)]
    epochs = [order[i : i + len(rows)] for i in range(0, len(order) - len(rows) + 1, len(rows))]
    assert len(epochs) >= 2 and all(sorted(epoch) == sorted(rows) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_a_stage_changes_shares_and_nothing_else(corpus: Path, tokenizer: Tokenizer) -> None:
    """a and b swap weights, then c joins; over all stages each source is read in its order, no row lost or twice."""
    per_step = 8 * T
    data = mixed(
        corpus, tokenizer,
        {"path": "a", "weight": 3.0}, {"path": "b/q3", "weight": 1.0}, {"path": "b/q1", "weight": 0.0},
        stages=(MixtureStage(start_tokens=5 * per_step - 1, weights=(1.0, 3.0, 0.0)),
                MixtureStage(start_tokens=9 * per_step, weights=(0.0, 1.0, 1.0))),
    )  # fmt: skip
    assert data.stage_rows == (5 * 8, 9 * 8)
    for steps, shares in ((range(5), (3, 1, 0)), (range(5, 9), (1, 3, 0)), (range(9, 14), (0, 1, 1))):
        seen = collections.Counter(drawn(data, steps))
        for source, share in zip(data.sources, shares, strict=True):
            read = sum(seen[key] for part in list_parts(source.path) for key in keys(part.path))
            assert abs(read - 8 * len(steps) * share / sum(shares)) <= 3.5
    for source in data.sources[1:]:  # of one part each: what is read is the beginning of what it alone would give
        rows = keys(Path(source.path))
        alone = [key for key in drawn(data, range(14)) if key in set(rows)]
        assert collections.Counter(alone) <= collections.Counter(rows * (1 + len(alone) // len(rows)))
        assert len(set(alone)) == min(len(alone), len(rows))


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[list[dict], tuple[MixtureStage, ...]]:
    paths = draw(st.lists(st.sampled_from(["a", "b", "a/q1", "b/q3", "."]), min_size=1, max_size=3))
    weight = st.sampled_from([0.1, 1.0, 2.5])
    sources = [{"path": path, "weight": draw(weight)} for path in paths]
    starts = draw(st.lists(st.integers(1, 20), max_size=2, unique=True))
    weights = st.lists(st.sampled_from([0.0, 1.0, 0.3]), min_size=len(paths), max_size=len(paths)).filter(any)
    stages = (MixtureStage(start_tokens=start * 12 * T, weights=tuple(draw(weights))) for start in sorted(starts))
    return sources, tuple(stages)


@given(mixtures(), st.sampled_from([1, 2, 3, 4, 6, 12]), st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(0, 25))
@settings(max_examples=15)
def test_any_mixture_goes_on_from_json_on_another_number_of_processes(
    corpus: Path, tokenizer: Tokenizer, case: tuple[list[dict], tuple[MixtureStage, ...]], before: int, after: int,
    step: int,
) -> None:  # fmt: skip
    sources, stages = case
    data = mixed(corpus, tokenizer, *sources, stages=stages, global_batch_size=12)
    whole = train_loader(data)
    iterator = make_train_iterator(train_loader(data, 0, before))
    iterator.set_state({"next_index": step})
    next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    iterator.close()
    parts = [make_train_iterator(train_loader(data, index, after), read_ahead=0) for index in range(after)]
    for part in parts:
        part.set_state(state)
    for number in range(step + 1, step + 4):
        batches = [next(part) for part in parts]
        assert_same({key: np.concatenate([batch[key] for batch in batches]) for key in KEYS}, whole[number])


def test_a_run_that_reads_a_source_too_often_does_not_start(corpus: Path, tokenizer: Tokenizer) -> None:
    data = mixed(corpus, tokenizer, {"path": "b/q3", "max_epochs": 2.0}, {"path": "a", "weight": 3.0})
    rows = load_manifest(corpus / "b" / "q3").train.rows
    with pytest.raises(ValueError) as error:
        make_train_loader(data, process_index=0, process_count=1, num_steps=1000)
    message = str(error.value)
    assert message.startswith(
        f"data.sources.max_epochs = 2.0 is not valid: a run of 1000 steps reads the {rows} rows of "
        f"'{corpus / 'b' / 'q3'}' {2000 / rows:.3g} times; it must be at least "
    )
    least, most = re.findall(r"at least ([\d.]+), or num_steps at most (\d+)\.", message)[0]
    assert describe_mixture(data, 8 * int(most))[0].epochs <= 2.0 < describe_mixture(data, 8 * int(most) + 8)[0].epochs
    make_train_loader(data, process_index=0, process_count=1, num_steps=int(most))
    enough = dataclasses.replace(data.sources[0], max_epochs=float(least))
    enough_data = dataclasses.replace(data, sources=(enough, data.sources[1]))
    make_train_loader(enough_data, process_index=0, process_count=1, num_steps=1000)


def test_quality_weights_that_do_not_fit(corpus: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(
        ValueError, match=r"data.sources.quality_weights = \(1.0, 2.0\) is not valid: .* 4 quality buckets"
    ):
        train_loader(mixed(corpus, tokenizer, {"path": "a", "quality_weights": (1.0, 2.0)}))
    with pytest.raises(ValueError, match="data.sources.quality_weights = .* nothing of .*q2' would be read"):
        train_loader(mixed(corpus, tokenizer, {"path": "a/q2", "quality_weights": (1.0, 1.0, 0.0, 1.0)}))


def test_validation_is_over_all_parts(corpus: Path, tokenizer: Tokenizer) -> None:
    data = mixed(corpus, tokenizer, {"path": "b"}, {"path": "a"})
    expected = [
        key for source in "ba" for bucket in range(4) for key in keys(corpus / source / f"q{bucket}", "validation")
    ]
    batches = make_validation_batches(data, 8)
    found = [row.tobytes() for index in range(len(batches)) for row in batches[index]["input_ids"]]
    assert found[: len(expected)] == expected and len(found) - len(expected) < 8


def broken_copy(data: DataConfig, tmp_path: Path) -> tuple[DataConfig, Path]:
    path = tmp_path / "copy"
    shutil.copytree(data.sources[0].path, path)
    return dataclasses.replace(data, sources=(SourceConfig(path=str(path)),)), path


def test_rows_made_for_other_settings(data: DataConfig, modules: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"data.sequence_length = 64 is not valid: the rows of .* have {T}"):
        train_loader(dataclasses.replace(data, sequence_length=64))
    other = train_tokenizer(modules[:2], tmp_path / "other.model", 600)
    with pytest.raises(ValueError, match=r"data.tokenizer = .*other.model.* made with another tokenizer"):
        train_loader(dataclasses.replace(data, tokenizer=str(other.path)))
    with pytest.raises(FileNotFoundError, match="data.tokenizer = 'nowhere' is not a file"):
        train_loader(dataclasses.replace(data, tokenizer="nowhere"))


def test_damaged_sources(data: DataConfig, tmp_path: Path) -> None:
    broken, path = broken_copy(data, tmp_path)
    (file, *_) = sorted(path.glob("train-00000-*"))
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=rf"is damaged: {file.name} has {len(content) - 1} bytes where"):
        train_loader(broken)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=rf"is incomplete: {file.name} is missing"):
        train_loader(broken)
    (path / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no manifest.json"):
        train_loader(broken)


@pytest.mark.parametrize("damage", ["bit", "end", "gone"])
def test_rows_that_are_damaged_after_the_start(data: DataConfig, tmp_path: Path, damage: str) -> None:
    broken, path = broken_copy(data, tmp_path)
    loader = train_loader(broken)
    (file, *_) = sorted(path.glob("train-00000-*"))
    content = file.read_bytes()
    record = read_rows(data.sources[0].path, "train")[0].tobytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(content.replace(record, record[::-1]) if damage == "bit" else content[: len(content) // 2])
    with pytest.raises(
        ValueError,
        match=rf"^row \d+ of '.*{file.name}' can't be read \(.+\): the file is damaged, was replaced or is out of "
        r"reach, and data.max_bad_rows = 0 allows no more\.$",
    ):
        for step in range(len(read_rows(data.sources[0].path, "train")) // 12 + 1):
            loader[step]


def test_rows_of_another_length_than_the_manifest_says(data: DataConfig, tmp_path: Path) -> None:
    broken, path = broken_copy(data, tmp_path)
    manifest = json.loads((path / "manifest.json").read_text()) | {"sequence_length": 16}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        ValueError, match=r"row \d+ of '.*train-.*' can't be read \(it has 132 bytes, not 68\): the file"
    ):
        train_loader(dataclasses.replace(broken, sequence_length=16))[0]


def test_empty_splits(data: DataConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    pack_texts(["only text for training"], tokenizer, tmp_path / "rows", T, validation_fraction=0)
    no_validation = dataclasses.replace(data, sources=(SourceConfig(path=str(tmp_path / "rows")),))
    train_loader(no_validation)
    with pytest.raises(ValueError, match=r"data.sources = .* none has held-out rows"):
        make_validation_batches(no_validation, 8)
    both = dataclasses.replace(data, sources=(*data.sources, *no_validation.sources))
    assert_same(make_validation_batches(both, 8)[0], make_validation_batches(data, 8)[0])
    pack_texts(["held out"], tokenizer, tmp_path / "none", T, validation_fraction=1 - 2**-50)
    with pytest.raises(ValueError, match=r"data.sources.path = .*none.* has no training rows"):
        train_loader(dataclasses.replace(data, sources=(SourceConfig(path=str(tmp_path / "none")),)))


def test_bad_processes(data: DataConfig) -> None:
    with pytest.raises(ValueError, match=r"process_index = 2 is not valid: it must be in 0\.\.1"):
        train_loader(data, 2, 2)
    with pytest.raises(ValueError, match="data.global_batch_size = 12 is not valid: .* multiple of the 5 processes"):
        train_loader(data, 0, 5)
    with pytest.raises(ValueError, match="batch_size = 0 is not valid"):
        make_validation_batches(data, 0)

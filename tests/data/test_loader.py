import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bc2_jax.config import DataConfig, SourceConfig
from bc2_jax.data.loader import make_train_iterator, make_train_loader, make_validation_batches, row_to_example
from bc2_jax.data.packing import pack_documents, read_rows
from bc2_jax.tokenizer import Tokenizer, train_tokenizer

T = 32
KEYS = {"input_ids", "labels", "segment_ids", "positions"}


@pytest.fixture(scope="module")
def data(tokenizer: Tokenizer, modules: list[str], tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Two sources, 3 to 1, with some held-out rows each."""
    folder = tmp_path_factory.mktemp("rows")
    parts = [text[start : start + 700] for text in modules for start in range(0, 21_000, 700)]
    for name, texts in (("a", parts[::2]), ("b", parts[1::2])):
        pack_documents(filter(None, texts), tokenizer, folder / name, T, validation_fraction=0.1, rows_per_file=300)
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


def reference_example(row: list[int]) -> dict[str, list[int]]:
    """Token by token, as one would say it."""
    example: dict[str, list[int]] = {key: [] for key in KEYS}
    segment, position = 1, 0
    for token, target in zip(row[:-1], row[1:], strict=True):
        pad = token == 0
        example["input_ids"].append(token)
        example["labels"].append(-100 if pad or token == 2 or target == 0 else target)
        example["segment_ids"].append(0 if pad else segment)
        example["positions"].append(0 if pad else position)
        position += 1
        if token == 2:
            segment, position = segment + 1, 0
    return example


ROWS = st.tuples(st.lists(st.sampled_from([2, 2, 5, 6, 639]), min_size=2, max_size=24), st.integers(0, 6))


@given(ROWS)
def test_row_to_example_against_a_loop(case: tuple[list[int], int]) -> None:
    row = case[0] + [0] * case[1]
    example = row_to_example(np.array(row, np.uint32))
    expected = reference_example(row)
    for key in KEYS:
        assert example[key].dtype == np.int32
        assert example[key].tolist() == expected[key]


@given(st.lists(st.lists(st.sampled_from([2, 2, 5, 0]), min_size=9, max_size=9), min_size=1, max_size=4))
def test_rows_of_a_batch_do_not_touch(rows: list[list[int]]) -> None:
    batch = row_to_example(np.array(rows, np.uint32))
    for index, row in enumerate(rows):
        assert_same({key: batch[key][index] for key in KEYS}, row_to_example(np.array(row, np.uint32)))


@given(st.lists(st.lists(st.integers(3, 50), min_size=1, max_size=20), min_size=1, max_size=8), st.integers(1, 9))
def test_packed_targets_are_the_unpacked_targets(documents: list[list[int]], length: int) -> None:
    """The (token, next token) pairs that are trained on are those of each document alone, each once."""
    stream = [token for document in documents for token in [*document, 2]]
    stream += [0] * (-(len(stream) - 1) % length)
    packed = []
    for start in range(0, len(stream) - 1, length):
        example = row_to_example(np.array(stream[start : start + length + 1], np.uint32))
        packed += [(int(i), int(j)) for i, j in zip(example["input_ids"], example["labels"], strict=True) if j != -100]
    unpacked = [pair for document in documents for pair in zip(document, [*document[1:], 2], strict=True)]
    assert packed == unpacked


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


def test_empty_splits(data: DataConfig, tokenizer: Tokenizer, tmp_path: Path) -> None:
    pack_documents(["only text for training"], tokenizer, tmp_path / "rows", T, validation_fraction=0)
    no_validation = dataclasses.replace(data, sources=(SourceConfig(path=str(tmp_path / "rows")),))
    train_loader(no_validation)
    with pytest.raises(ValueError, match=r"data.sources = .* none has held-out rows"):
        make_validation_batches(no_validation, 8)
    both = dataclasses.replace(data, sources=(*data.sources, *no_validation.sources))
    assert_same(make_validation_batches(both, 8)[0], make_validation_batches(data, 8)[0])
    pack_documents(["held out"], tokenizer, tmp_path / "none", T, validation_fraction=1 - 2**-50)
    with pytest.raises(ValueError, match=r"data.sources.path = .*none.* has no training rows"):
        train_loader(dataclasses.replace(data, sources=(SourceConfig(path=str(tmp_path / "none")),)))


def test_bad_processes(data: DataConfig) -> None:
    with pytest.raises(ValueError, match=r"process_index = 2 is not valid: it must be in 0\.\.1"):
        train_loader(data, 2, 2)
    with pytest.raises(ValueError, match="data.global_batch_size = 12 is not valid: .* multiple of the 5 processes"):
        train_loader(data, 0, 5)
    with pytest.raises(ValueError, match="batch_size = 0 is not valid"):
        make_validation_batches(data, 0)

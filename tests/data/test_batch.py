"""Rows of tokens -> fields, and batches on devices, some of which are not here."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bc2_jax.config import DataConfig, MeshConfig, SourceConfig
from bc2_jax.data.batch import FIELDS, abstract_batch, batch_part, make_put, row_to_example
from bc2_jax.sharding import DEFAULT_RULES, MESH_AXES, Mesh, make_mesh

GOLDEN = Path(__file__).parents[1] / "golden" / "align"


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys() == set(FIELDS)
    for key in FIELDS:
        np.testing.assert_array_equal(a[key], b[key])


def reference_example(row: list[int]) -> dict[str, list[int]]:
    """Token by token, as one would say it."""
    example: dict[str, list[int]] = {key: [] for key in FIELDS}
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
    for key in FIELDS:
        assert example[key].dtype == np.int32
        assert example[key].tolist() == expected[key]


@given(st.lists(st.lists(st.sampled_from([2, 2, 5, 0]), min_size=9, max_size=9), min_size=1, max_size=4))
def test_rows_of_a_batch_do_not_touch(rows: list[list[int]]) -> None:
    batch = row_to_example(np.array(rows, np.uint32))
    for index, row in enumerate(rows):
        assert_same({key: batch[key][index] for key in FIELDS}, row_to_example(np.array(row, np.uint32)))


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


def fake_mesh(shape: tuple[int, ...], devices_per_process: int) -> Mesh:
    """(data, fsdp, fsdp_inner, context, tensor) over devices of several processes, in order."""
    devices = [SimpleNamespace(process_index=i // devices_per_process) for i in range(math.prod(shape))]
    array = np.array(devices, object).reshape(shape)
    return SimpleNamespace(devices=array, axis_names=MESH_AXES)


@pytest.mark.parametrize(
    ("shape", "devices_per_process", "parts"),
    [
        # Every process has its own rows.
        ((1, 8, 1, 1, 1), 2, [(0, 4, (0, 1)), (1, 4, (2, 3)), (2, 4, (4, 5)), (3, 4, (6, 7))]),
        ((2, 1, 2, 1, 2), 4, [(0, 2, (0, 1)), (1, 2, (2, 3))]),
        # Four devices cut one sequence: two processes of two devices read the same rows.
        ((1, 2, 1, 4, 1), 2, [(0, 2, (0,)), (0, 2, (0,)), (1, 2, (1,)), (1, 2, (1,))]),
        ((1, 1, 1, 4, 2), 2, [(0, 1, (0,))] * 4),
    ],
)
def test_processes_that_cut_the_same_sequences_read_the_same_rows(shape, devices_per_process, parts):
    mesh = fake_mesh(shape, devices_per_process)
    assert [batch_part(mesh, process) for process in range(len(parts))] == parts


def test_processes_that_share_some_of_their_rows_are_refused():
    with pytest.raises(ValueError, match=r"mesh.context \* mesh.tensor = 3 is not valid: it must divide the devices"):
        batch_part(fake_mesh((1, 2, 1, 3, 1), 2), 0)


@pytest.mark.parametrize("mesh", [{"context": 4}, {"data": 2, "fsdp_inner": 2, "context": 2}, {"tensor": 2}], ids=str)
def test_a_batch_is_placed_row_by_row(mesh: dict[str, int]):
    data = DataConfig(
        sources=(SourceConfig(path="rows"),), tokenizer="t", sequence_length=8, global_batch_size=16,
        accumulation_steps=2,
    )  # fmt: skip
    batch = {"labels": np.arange(16 * 8, dtype=np.int32).reshape(16, 8)}
    placed = make_put(data, make_mesh(MeshConfig(**mesh)))(batch)["labels"]
    np.testing.assert_array_equal(placed, batch["labels"].reshape(2, 8, 8))
    assert placed.sharding.spec == DEFAULT_RULES.spec(None, "batch", "sequence")
    beside = np.arange(16 * 3, dtype=np.float32).reshape(16, 3)
    values = make_put(data, make_mesh(MeshConfig(**mesh)))({"beside": beside})["beside"]
    np.testing.assert_array_equal(values, beside.reshape(2, 8, 3))
    for name, abstract in abstract_batch(data, make_mesh(MeshConfig(**mesh)), {"beside": 3}).items():
        array = placed if name in FIELDS else values
        assert (abstract.shape, abstract.dtype, abstract.sharding) == (array.shape, array.dtype, array.sharding)


def test_rows_of_conversations_have_the_released_labels():
    """One sample a row, padded, and all that fit in one row: ids and targets of the released rule, exactly."""
    cases = json.loads((GOLDEN / "sft_text.json").read_text())
    sft = np.load(GOLDEN / "sft.npz")
    samples = [(case["input_ids"], case["targets"]) for case in cases]
    for ids, mask, labels in zip(sft["input_ids"], sft["attention_mask"], sft["labels"], strict=True):
        length = int(mask.sum())
        samples.append((ids[:length].tolist(), [*labels[1:length].tolist(), -100]))
    assert len(samples) == len(cases) + 6
    for ids, targets in samples:
        example = row_to_example(chat_row([(ids, targets)], len(ids) + 3))
        assert example["input_ids"].tolist() == [*ids, 0, 0, 0]
        assert example["labels"].tolist() == [*targets, -100, -100, -100]
    packed = row_to_example(chat_row(samples, sum(len(ids) for ids, _ in samples)))
    assert packed["labels"].tolist() == [target for _, targets in samples for target in targets]
    assert packed["segment_ids"].max() == len(samples)


TOKENS = st.sampled_from([1, 2, 195, 196, 7, 125_695])
STRETCH = st.lists(st.tuples(TOKENS, st.booleans()), min_size=1, max_size=9)
# A trunk, which may be empty where there are branches.
BRANCHING = st.tuples(st.just([]) | STRETCH, st.lists(STRETCH, min_size=1, max_size=3))
SAMPLES = st.lists(st.tuples(STRETCH, st.just([])) | BRANCHING, min_size=1, max_size=5)
KINDS = st.one_of(SAMPLES, st.lists(st.sampled_from([2, 5, 0]), max_size=12))


@given(st.lists(KINDS, min_size=1, max_size=4))
def test_a_batch_of_all_kinds_gives_each_row_as_it_is_alone(contents: list) -> None:
    """Each sample has its ids, targets and positions in a segment of its own, whatever stands beside it; each of its
    branches has those of trunk and branch alone."""
    length = 5 * 4 * 9
    rows, expected = [], []
    for content in contents:
        if not content or isinstance(content[0], int):
            rows.append(np.pad(np.array(content, np.uint32), (0, length + 1 - len(content))))
            expected.append(reference_example(rows[-1].tolist()))
            continue
        row: list[int] = []
        whole: dict[str, list[int]] = {key: [] for key in FIELDS}
        for document, (trunk, branches) in enumerate(content, 1):
            parts = [(document, 0, trunk)] if trunk else []
            parts += [(document + k * 2**24, len(trunk), branch) for k, branch in enumerate(branches, 1)]
            for number, (segment, first, part) in enumerate(parts):
                ids, targets = [token for token, _ in part], targets_of(part)
                row += marked(ids, targets, (1 << 30) * (number == 0) | (1 << 29) * (segment >= 2**24))
                values = (ids, targets, [segment] * len(ids), range(first, first + len(ids)))
                for key, value in zip(FIELDS, values, strict=True):
                    whole[key] += value
        rows.append(np.array(row + [0] * (length + 1 - len(row)), np.uint32))
        padding = length - len(whole["labels"])
        expected.append({key: values + [-100 if key == "labels" else 0] * padding for key, values in whole.items()})
    batch = row_to_example(np.stack(rows))
    for index, example in enumerate(expected):
        assert {key: batch[key][index].tolist() for key in FIELDS} == example
        assert_same({key: batch[key][index] for key in FIELDS}, row_to_example(rows[index]))


def targets_of(sample: list[tuple[int, bool]]) -> list[int]:
    return [(2 if token == 195 else token) if is_target else -100 for token, is_target in sample[1:]] + [-100]


def chat_row(samples: list[tuple[list[int], list[int]]], length: int) -> np.ndarray:
    """A row of `length` inputs as it stands in a file: an answer's tokens and the token after it are marked."""
    row = [token for ids, targets in samples for token in marked(ids, targets, 1 << 30)]
    return np.array(row + [0] * (length + 1 - len(row)), np.uint32)


def marked(ids: list[int], targets: list[int], begins: int) -> list[int]:
    """Tokens with their flags; `begins` are those of the first."""
    return [
        token | begins * (place == 0) | (1 << 31) * (place > 0 and targets[place - 1] != -100)
        for place, token in enumerate(ids)
    ]

"""The comparison of outputs, on arrays with known differences, and tools/check_parity.py on models on disk."""

from __future__ import annotations

import math
import shutil
import sys

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bc2_jax.convert
from bc2_jax.convert import conversion, hf, parity
from bc2_jax.convert.parity import Outputs, compare, read_reference
from tests.convert.models import GOLDEN, TINY, write_tensors
from tests.programs import load_program

tool = load_program("check_parity")


def random_outputs(shape: tuple[int, ...] = (2, 5, 24), layers: int = 3) -> Outputs:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal(shape, dtype=np.float32)
    return Outputs(logits, rng.standard_normal((layers + 1, *shape[:2], 8), dtype=np.float32))


def changed(outputs: Outputs, layer: int, by: float) -> Outputs:
    """With one value of a hidden state's largest moved by `by` times it."""
    hidden_states = outputs.hidden_states.copy()
    hidden_states[layer].flat[np.abs(hidden_states[layer]).argmax()] *= 1 + by
    return Outputs(outputs.logits, hidden_states)


def test_known_values():
    ours, reference = np.log([[[2, 4, 2], [6, 1, 1]]]), np.log([[[4, 2, 2], [6, 1, 1]]])
    hidden = np.array([[[[1.0, -4.0], [2.0, 0.0]]], [[[8.0, 0.0], [0.0, 0.0]]]])
    result = compare(Outputs(reference, hidden), Outputs(ours, hidden + [[[[0.5, 0]]], [[[0, -2]]]]), 0.2)
    assert result.largest_logit == pytest.approx(math.log(6))
    assert result.largest_logit_difference == pytest.approx(math.log(2))
    assert result.mean_logit_difference == pytest.approx(2 * math.log(2) / 6)
    assert result.top1_agreement == 0.5
    # Over two positions: p = (1/2, 1/4, 1/4) against q = (1/4, 1/2, 1/4), and two that are equal.
    assert result.kl == pytest.approx(0.25 * math.log(2) / 2)
    assert result.largest_hidden == (4, 8) and result.hidden_difference == (0.5, 2)
    assert result.first_divergent == 1 and not result.logits_agree and not result.holds


def test_a_constant_added_to_the_logits_changes_no_distribution():
    outputs = random_outputs()
    result = compare(outputs, Outputs(outputs.logits + np.float32(1), outputs.hidden_states), 1e-3)
    assert abs(result.kl) < 1e-6 and result.top1_agreement == 1
    assert result.mean_logit_difference == pytest.approx(1, abs=1e-6) and not result.holds


@pytest.mark.parametrize("layer", range(4))
def test_first_divergent_hidden_state(layer):
    outputs = random_outputs()
    assert compare(outputs, changed(outputs, layer, 0.5e-3), 1e-3).holds
    result = compare(outputs, changed(changed(outputs, 3, 0.1), layer, 2e-3), 1e-3)
    assert result.first_divergent == layer and result.logits_agree and not result.holds


def test_blocks_change_nothing(monkeypatch):
    reference, ours = random_outputs(), changed(random_outputs(), 1, 0.3)
    ours.logits[1, 2] += 1
    whole = compare(reference, ours, 1e-3)
    monkeypatch.setattr(parity, "_BLOCK_VALUES", 3 * 24)
    blocks = compare(reference, ours, 1e-3)
    assert blocks.mean_logit_difference == pytest.approx(whole.mean_logit_difference)
    assert blocks.kl == pytest.approx(whole.kl)
    for field in ("largest_logit_difference", "top1_agreement", "hidden_difference", "first_divergent"):
        assert getattr(blocks, field) == getattr(whole, field)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("who", ["reference", "ours", "both"])
def test_what_is_not_finite_is_no_parity(value, who):
    good, logits, hidden = random_outputs(), random_outputs(), random_outputs()
    logits.logits[1, 1, 1] = value
    hidden.hidden_states[2, 1, 1, 1] = value

    def pair(bad: Outputs) -> tuple[Outputs, Outputs]:
        return (good if who == "ours" else bad), (good if who == "reference" else bad)

    assert not compare(*pair(logits), 1e-3).logits_agree
    assert compare(*pair(hidden), 1e-3).first_divergent == 2


def test_bfloat16_is_compared_as_it_is():
    outputs = random_outputs()
    rounded = Outputs(outputs.logits.astype(ml_dtypes.bfloat16), outputs.hidden_states.astype(ml_dtypes.bfloat16))
    result = compare(outputs, rounded, 5e-2)
    assert result.holds and 0 < result.largest_logit_difference <= result.largest_logit / 256


def test_compare_refuses():
    outputs = random_outputs()
    with pytest.raises(ValueError, match=r"shape of logits = \(2, 5, 25\) .*: the reference's is \(2, 5, 24\)\."):
        compare(outputs, Outputs(np.zeros((2, 5, 25)), outputs.hidden_states), 1e-3)
    with pytest.raises(ValueError, match="shape of hidden_states"):
        compare(outputs, Outputs(outputs.logits, outputs.hidden_states[1:]), 1e-3)
    with pytest.raises(ValueError, match="nothing to compare"):
        compare(random_outputs((0, 5, 24)), random_outputs((0, 5, 24)), 1e-3)
    for tolerance in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="tolerance"):
            compare(outputs, outputs, tolerance)


def recorded(**changes) -> dict[str, np.ndarray]:
    """What an .npz for TINY holds; None takes a key out."""
    arrays = {
        "input_ids": np.arange(6).reshape(2, 3),
        "eval_logits": np.zeros((2, 3, TINY.vocab_size), np.float32),
        "hidden_states": np.zeros((TINY.num_hidden_layers + 1, 2, 3, TINY.hidden_size), np.float32),
    }
    return {key: array for key, array in (arrays | changes).items() if array is not None}


def test_reads_either_logits(tmp_path):
    arrays = recorded(train_logits=np.ones((2, 3, TINY.vocab_size), np.float32))
    np.savez(tmp_path / "both.npz", **arrays)
    input_ids, outputs = read_reference(tmp_path / "both.npz", TINY)
    np.testing.assert_array_equal(input_ids, arrays["input_ids"])
    assert outputs.logits.max() == 0
    del arrays["eval_logits"]
    np.savez(tmp_path / "train.npz", **arrays)
    assert read_reference(tmp_path / "train.npz", TINY)[1].logits.min() == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_ids": None}, r"has no input_ids: expected"),
        ({"eval_logits": None, "hidden_states": None}, r"has no eval_logits or train_logits, hidden_states: expected"),
        ({"input_ids": np.zeros((2, 3))}, "dtype of input_ids = 'float64' is not valid"),
        ({"input_ids": np.zeros(6, int)}, r"shape of input_ids = \(6,\) is not valid"),
        ({"input_ids": np.zeros((0, 3), int)}, r"shape of input_ids = \(0, 3\) is not valid"),
        ({"input_ids": np.full((2, 3), 24)}, r"token id = 24 is not valid: it must be in 0..23\."),
        ({"input_ids": np.full((2, 3), -1)}, r"token id = -1 is not valid: it must be in 0..23\."),
        ({"eval_logits": np.zeros((2, 3, 25))}, r"shape of eval_logits = \(2, 3, 25\) .* it must be \(2, 3, 24\)\."),
        ({"eval_logits": np.zeros((2, 3, 24), int)}, "dtype of eval_logits = 'int64' is not valid"),
        ({"hidden_states": np.zeros((2, 2, 3, 16))}, r"shape of hidden_states = .* it must be \(3, 2, 3, 16\)\."),
        ({"hidden_states": np.array(["x", {}], object)}, "not an .npz file of plain arrays"),
    ],
)
def test_read_reference_refuses(tmp_path, changes, message):
    np.savez(tmp_path / "bad.npz", **recorded(**changes))
    with pytest.raises(ValueError, match=message):
        read_reference(tmp_path / "bad.npz", TINY)


def test_read_reference_refuses_other_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a file"):
        read_reference(tmp_path, TINY)
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "empty.npz").touch()
    np.savez(tmp_path / "whole.npz", **recorded())
    (tmp_path / "cut.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:-100])
    for name in ("one.npy", "text.npz", "empty.npz", "cut.npz"):
        with pytest.raises(ValueError, match="is not an .npz file of plain arrays"):
            read_reference(tmp_path / name, TINY)


@given(st.sampled_from([np.savez, np.savez_compressed]), st.lists(st.floats(0, 0.999), min_size=1, max_size=4))
@settings(max_examples=60)
def test_a_damaged_reference_is_one_sentence(tmp_path_factory, save, places):
    path = tmp_path_factory.mktemp("damaged") / "x.npz"
    save(path, **recorded())
    content = bytearray(path.read_bytes())
    for place in places:
        content[int(place * len(content))] ^= 4
    path.write_bytes(content)
    try:
        assert read_reference(path, TINY)[0].dtype.kind in "iu"
    except ValueError as error:
        assert "\n" not in str(error) and str(error).endswith(".")


@pytest.mark.parametrize(
    ("options", "verdict"),
    [
        ((), "Parity holds within 0.001."),
        (("--tolerance", "1e-9"), "No parity within 1e-09: "),
        (("--dtype", "bfloat16"), "Parity holds within 0.05."),
    ],
)
def test_tool_on_golden_models(golden, capsys, options, verdict):
    command = [str(golden.folder), "--reference", str(golden.folder / "golden.npz"), *options]
    assert tool.main(command) == (0 if "holds" in verdict else 1)
    assert capsys.readouterr().out.rpartition("\n\n")[2].startswith(verdict)


def test_tool_takes_a_checkpoint_of_ours(tmp_path, capsys):
    conversion.to_orbax(GOLDEN / "rope-tiny", tmp_path / "checkpoint")
    reference = GOLDEN / "rope-tiny" / "golden.npz"
    assert tool.main([str(tmp_path / "checkpoint"), "--reference", str(reference)]) == 0
    assert tool.main([str(tmp_path / "checkpoint"), "--torch"]) == 1
    assert "must be a PyTorch folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "name", "told"),
    [
        ("rope-tiny", "model.embed_tokens.weight", "the first hidden state to differ is that of embedding."),
        ("alibi-tiny", "model.layers.0.mlp.up_proj.weight", "the first hidden state to differ is that of layer 0."),
        (
            "rope-tiny",
            "model.layers.1.self_attn.o_proj.weight",
            "the first hidden state to differ is that of layer 1 and final norm.",
        ),
        ("alibi-tiny", "lm_head.weight", "the logits differ, no hidden state does, so the head does."),
    ],
)
def test_tool_names_where_a_wrong_tensor_shows(tmp_path, capsys, model, name, told):
    tensors = {key: tensor.read() for key, tensor in hf.open_folder(GOLDEN / model).items()}
    tensors[name] = tensors[name] + np.float32(0.05)
    folder = write_tensors(tmp_path / "wrong", {"model.safetensors": tensors})
    shutil.copy(GOLDEN / model / "config.json", folder)
    assert tool.main([str(folder), "--reference", str(GOLDEN / model / "golden.npz")]) == 1
    assert capsys.readouterr().out.endswith(f"No parity within 0.001: {told}\n")


def test_tool_refuses(monkeypatch, capsys, tmp_path):
    folder = str(GOLDEN / "rope-tiny")
    np.savez(tmp_path / "bad.npz", input_ids=np.zeros((1, 1), int))
    # As if torch were not installed, whether it is or not.
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "bc2_jax.convert.torch_model", raising=False)
    monkeypatch.delattr(bc2_jax.convert, "torch_model", raising=False)
    for arguments, message in (
        ([folder], "there is no reference: give --reference NPZ or --torch."),
        ([folder, "--torch"], "--torch needs PyTorch, which is not installed: pip install torch."),
        ([folder, "--torch", "--length", "0"], "length = 0 is not valid: it must be positive."),
        ([folder, "--reference", str(tmp_path / "bad.npz")], "has no eval_logits or train_logits, hidden_states"),
        ([str(tmp_path), "--torch"], str(tmp_path)),
    ):
        assert tool.main(arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_another_models_reference_is_no_parity(capsys):
    reference = GOLDEN / "rope-tiny" / "golden.npz"
    assert tool.main([str(GOLDEN / "alibi-tiny"), "--reference", str(reference)]) == 1
    assert "that of embedding" in capsys.readouterr().out

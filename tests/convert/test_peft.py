"""Adapters in PEFT's files: read, written, refused; merged into models on disk."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bc2_jax.align.lora import Adapter, load_peft, merge, save_peft
from bc2_jax.config import ModelConfig
from bc2_jax.config.lora import LORA_TARGETS, LoraConfig
from bc2_jax.convert.conversion import Options
from bc2_jax.convert.hf_write import save_folder
from bc2_jax.convert.merging import convert_adapter, merge_lora
from bc2_jax.convert.peft import to_layout
from bc2_jax.convert.pickled_write import write_pickled
from bc2_jax.convert.pretrained import find_model, load_params, load_pretrained
from bc2_jax.convert.safetensors import read_safetensors, write_safetensors
from bc2_jax.model.lora import abstract_adapter
from tests.convert.models import TINY, random_params

ALIGN = Path(__file__).parents[1] / "golden" / "align"
ROPE = ALIGN.parent / "rope-tiny"
MODEL = find_model(ROPE).config


def random_adapter(config: LoraConfig, model: ModelConfig = TINY) -> Adapter:
    rng = np.random.default_rng(0)

    def draw(s: jax.ShapeDtypeStruct) -> np.ndarray:
        return rng.standard_normal(s.shape).astype(np.float32)

    return Adapter(config, jax.tree.map(draw, abstract_adapter(config, model, None)))


def assert_same(a: Adapter, b: Adapter) -> None:
    assert a.config == b.config
    jax.tree.map(np.testing.assert_array_equal, a.params, b.params)


@st.composite
def configs(draw) -> LoraConfig:
    targets = draw(st.lists(st.sampled_from(LORA_TARGETS), min_size=1, unique=True))
    if "W_pack" in targets:
        targets = [t for t in targets if t not in ("q_proj", "k_proj", "v_proj")]
    each = draw(st.booleans()) and len(targets) > 1
    n = len(targets)
    return LoraConfig(
        rank=5, alpha=draw(st.sampled_from([1, 7.5, 32])), targets=tuple(targets),
        ranks=(5, *(draw(st.integers(1, 4)) for _ in range(n - 1))) if each else (),
        alphas=(3.25, *(draw(st.sampled_from([1.0, 2.5])) for _ in range(n - 1))) if each else (),
        dropout=draw(st.sampled_from([0.0, 0.1])), rslora=draw(st.booleans()), dora=draw(st.booleans()),
    )  # fmt: skip


@settings(max_examples=15, deadline=None)
@given(config=configs())
def test_what_is_written_is_read(tmp_path_factory, config: LoraConfig):
    folder = tmp_path_factory.mktemp("adapter") / "peft"
    adapter = random_adapter(config)
    save_peft(folder, adapter, TINY, base="MODEL")
    assert_same(load_peft(folder, TINY), adapter)
    raw = json.loads((folder / "adapter_config.json").read_text())
    assert raw["base_model_name_or_path"] == "MODEL"
    assert None not in raw.values()


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(rank=3, alpha=5, targets=("q_proj", "k_proj", "v_proj", "o_proj"), dora=True, rslora=True),
        LoraConfig(rank=3, alpha=5, targets=("q_proj", "v_proj"), ranks=(2, 3), alphas=(3, 4)),
        LoraConfig(rank=2, alpha=5, targets=("W_pack", "up_proj"), dora=True),
    ],
    ids=["dora", "ranks", "W_pack"],
)
def test_layouts_change_the_weights_alike(config: LoraConfig):
    adapter, params = random_adapter(config), random_params(TINY, np.float32)
    expected = merge(params, adapter)
    for layout, absent in (("baichuan2", {"q_proj", "k_proj", "v_proj"}), ("llama", {"W_pack"})):
        other = to_layout(adapter, layout)
        assert not absent & set(other.config.targets)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), merge(params, other), expected
        )


def test_dora_on_a_part_of_w_pack(tmp_path):
    adapter = random_adapter(LoraConfig(rank=2, targets=("q_proj",), dora=True), MODEL)
    with pytest.raises(ValueError, match="DoRA on q_proj without k_proj, v_proj"):
        save_peft(tmp_path / "a", adapter, MODEL, layout="baichuan2")
    save_peft(tmp_path / "a", adapter, MODEL, base=ROPE)  # nobody asked for this layout
    assert_same(load_peft(tmp_path / "a", MODEL), adapter)


def test_the_layout_is_that_of_the_base(tmp_path):
    save_peft(tmp_path / "a", load_peft(ALIGN / "adapter_rslora", MODEL), MODEL, base=ROPE)
    assert load_peft(tmp_path / "a", MODEL).config.targets == ("W_pack",)


def test_an_old_folder_is_replaced_if_it_is_ours(tmp_path):
    adapter = random_adapter(LoraConfig(rank=1, targets=("o_proj",)))
    save_peft(tmp_path / "a", adapter, TINY)
    with pytest.raises(FileExistsError):
        save_peft(tmp_path / "a", adapter, TINY)
    save_peft(tmp_path / "a", adapter, TINY, overwrite=True)
    (tmp_path / "a" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        save_peft(tmp_path / "a", adapter, TINY, overwrite=True)


def test_other_spellings_and_bin_files(tmp_path):
    """Names with the adapter's own in them, bf16, and the format of PEFT before 0.5."""
    tensors = {n: t.read() for n, t in read_safetensors(ALIGN / "adapter_dora" / "adapter_model.safetensors").items()}
    named = {n.replace(".weight", ".default.weight"): t for n, t in tensors.items()}
    shutil.copy(ALIGN / "adapter_dora" / "adapter_config.json", tmp_path)
    write_pickled(tmp_path / "adapter_model.bin", np.float32, {n: t.shape for n, t in named.items()}, named.items())
    assert_same(load_peft(tmp_path, MODEL), load_peft(ALIGN / "adapter_dora", MODEL))


def edited(folder: Path, keys: dict | None = None, change=lambda tensors: None) -> Path:
    """adapter_all with other keys in its config and other tensors."""
    raw = json.loads((ALIGN / "adapter_all" / "adapter_config.json").read_text()) | (keys or {})
    (folder / "adapter_config.json").write_text(json.dumps(raw))
    read = read_safetensors(ALIGN / "adapter_all" / "adapter_model.safetensors")
    tensors = {name: np.array(tensor.read()) for name, tensor in read.items()}
    change(tensors)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    write_safetensors(folder / "adapter_model.safetensors", np.float32, shapes, tensors.items())
    return folder


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias = 'lora_only'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"use_qalora": True}, "use_qalora"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"peft_type": "VERA"}, "peft_type = 'VERA'"),
        ({"use_new_kind_of_gate": True}, "use_new_kind_of_gate = True is not known"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head, which gets no adapter"),
        ({"target_modules": ["q_proj", "W_pack"]}, None),
        ({"r": 5}, "q_proj.lora_A"),
        ({"r": "four"}, "r = 'four'"),
        ({"rank_pattern": {r"layers\.0\.self_attn\.q_proj": 2}}, "q_proj has one value in all layers"),
        ({"rank_pattern": {"q_proj": 2}}, "q_proj.lora_A"),
        ({"use_dora": True}, "q_proj.lora_magnitude_vector"),
        ({"future_note": None, "peft_version": "9"}, None),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_settings_are_honoured_or_refused(tmp_path, keys, message):
    folder = edited(tmp_path, keys)
    if message is None:
        load_peft(folder, MODEL)
        return
    with pytest.raises(ValueError, match=message.replace("(", r"\(")) as caught:
        load_peft(folder, MODEL)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{Q0}.lora_A.weight"), r"layers\.0\.self_attn\.q_proj\.lora_A"),
        (lambda t: [t.pop(n) for n in list(t) if "q_proj" in n], "target_modules names q_proj"),
        (lambda t: t.update({f"{Q0}.lora_A.default.weight": t[f"{Q0}.lora_A.weight"]}), "twice"),
        (lambda t: t.update({"base_model.model.lm_head.lora_A.weight": np.ones((2, 2), np.float32)}), "lm_head"),
        (lambda t: t.update({f"{Q0}.lora_B.weight": np.ones((3, 4), np.float32)}), "q_proj.lora_B"),
        (lambda t: t[f"{Q0}.lora_A.weight"].fill(np.nan), "not finite"),
        (lambda t: t.clear(), "no adapter on"),
    ],
    ids=["missing", "target", "twice", "extra", "shape", "nan", "empty"],
)
def test_tensors_are_all_there_and_known(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        load_peft(edited(tmp_path, change=change), MODEL)


@pytest.fixture(scope="module")
def alibi(tmp_path_factory):
    """A model with ALiBi in bf16 as released, and an adapter on its W_pack."""
    root = tmp_path_factory.mktemp("alibi")
    config = dataclasses.replace(TINY, position_embedding="alibi")
    save_folder(random_params(config, np.float32), config, root / "base")
    save_peft(root / "adapter", random_adapter(LoraConfig(rank=2, targets=("W_pack", "down_proj"))), config)
    return root


def test_merged_on_disk_is_merged_in_memory(alibi, tmp_path):
    summary = merge_lora(alibi / "base", alibi / "adapter", tmp_path / "out", Options(verify=True))
    assert "bfloat16 loses at most" in summary.notes[0]
    params, config = load_params(alibi / "base", "bfloat16")
    expected = merge(params, load_peft(alibi / "adapter", config))

    def assert_close(a, b):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=2**-7)

    jax.tree.map(assert_close, load_params(tmp_path / "out", "bfloat16")[0], expected)


def test_checkpoints_of_adapters(alibi, tmp_path):
    convert_adapter(alibi / "adapter", tmp_path / "ckpt", to_peft=False, base=str(alibi / "base"))
    with pytest.raises(ValueError, match=r"is a LoRA adapter for .*base: merge the two with `python tools/convert.py"):
        find_model(tmp_path / "ckpt")
    with pytest.raises(FileNotFoundError, match="is a LoRA adapter, which needs|is a LoRA adapter for"):
        find_model(alibi / "adapter")
    convert_adapter(tmp_path / "ckpt", tmp_path / "peft", to_peft=True)
    config = find_model(alibi / "base").config
    assert_same(load_peft(tmp_path / "peft", config), load_peft(alibi / "adapter", config))
    models = [load_pretrained(alibi / "base", adapter=path) for path in (tmp_path / "ckpt", alibi / "adapter")]
    first, second = (model.layers.self_attn.q_proj for model in models)
    np.testing.assert_array_equal(first.lora_b.weight[...], second.lora_b.weight[...])


def test_what_is_no_adapter_is_refused(alibi, tmp_path):
    with pytest.raises(ValueError, match="is not an adapter"):
        load_pretrained(alibi / "base", adapter=alibi / "base")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_pretrained(alibi / "base", adapter=tmp_path / "nothing")
    with pytest.raises(ValueError, match="name the model with --base"):
        convert_adapter(alibi / "adapter", tmp_path / "ckpt", to_peft=False)

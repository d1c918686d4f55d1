"""Reads and writes adapters in PEFT's files: adapter_config.json beside adapter_model.safetensors (or .bin)."""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import jax
import numpy as np

from bc2_jax.config import ModelConfig
from bc2_jax.config.lora import LORA_TARGETS, LoraConfig, LoraTarget
from bc2_jax.convert import hf
from bc2_jax.convert.checksums import verify_file, write_sha256sums
from bc2_jax.convert.folder import foreign_in_adapter, written_whole
from bc2_jax.convert.hf_config import read_json, write_json
from bc2_jax.convert.hf_keys import as_json, is_empty
from bc2_jax.convert.mapped import MappedTensor
from bc2_jax.convert.pickled import read_pickled
from bc2_jax.convert.safetensors import read_safetensors, write_safetensors
from bc2_jax.convert.table import flatten, torch_name, unflatten
from bc2_jax.files import file_sha256
from bc2_jax.model.lora import SLOTS, Adapter, abstract_adapter, part_of
from bc2_jax.validation import join_some, require, show

_log = logging.getLogger(__name__)
CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
_PICKLED_NAME = "adapter_model.bin"
LoraLayout = Literal["baichuan2", "llama"]
_PARTS = cast(tuple[LoraTarget, ...], SLOTS["W_pack"].weights)
_BLOCK = SLOTS["W_pack"].block
_PREFIX = "base_model.model."
# Our array -> PEFT's name after the module's.
_NAMES = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
# Names in a state dict in memory contain ".default"; those in files do not.
_SPELLING = re.compile(r"(lora_[AB])(?:\.default)?(\.weight)|(lora_magnitude_vector)(?:\.default)?(?:\.weight)?")

# Keys of adapter_config.json that PEFT 0.3 to 0.21 write: part of a LoraConfig, one supported value, or harmless.
_HONOURED = """
r lora_alpha lora_dropout rank_pattern alpha_pattern target_modules use_rslora use_dora base_model_name_or_path
"""
_MUST_BE_EMPTY = """
modules_to_save lora_bias fan_in_fan_out layers_to_transform layer_replication use_qalora use_bdlora
alora_invocation_tokens trainable_token_indices target_parameters arrow_config kasa_config monteclora_config
velora_config megatron_config enable_lora merge_weights
"""
# Initialisation, training, placement, settings of refused features, notes.
_HARMLESS = """
auto_mapping inference_mode revision peft_version megatron_core qalora_group_size ensure_weight_tying exclude_modules
layers_pattern loftq_config corda_config eva_config lora_ga_config runtime_config
"""
_WITHOUT_CHECK = frozenset([*_HONOURED.split(), *_HARMLESS.split()])
# Key -> supported values; null, false and empty are always legal.
_ONLY: dict[str, tuple] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # Other values change the base model's weights before training (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA ...).
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),
    "task_type": ("CAUSAL_LM",),
    **dict.fromkeys(_MUST_BE_EMPTY.split(), ()),
}
_HARMLESS_PATTERN = re.compile(r"version$|comment|license|^_|name|path")


@dataclasses.dataclass(frozen=True)
class PeftFolder:
    """An adapter's files; only the config has been read."""

    path: Path
    weights: Path
    raw: Mapping[str, Any]  # adapter_config.json; all its keys are known and supported

    @property
    def base(self) -> str | None:
        """Path of the base model at training time."""
        base = self.raw.get("base_model_name_or_path")
        return base if isinstance(base, str) and base else None


def is_peft_folder(path: str | Path) -> bool:
    return (Path(path) / CONFIG_NAME).is_file()


def open_peft(path: str | Path) -> PeftFolder:
    """Finds the files and checks the config; raises FileNotFoundError or ValueError."""
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} {'is a file' if folder.exists() else 'does not exist'}: give the folder of "
                                f"an adapter, with {CONFIG_NAME} in it.")  # fmt: skip
    raw = read_json(folder / CONFIG_NAME)
    _check_keys(raw, folder / CONFIG_NAME)
    for name in (WEIGHTS_NAME, _PICKLED_NAME):
        if (folder / name).is_file():
            return PeftFolder(folder, folder / name, raw)
    raise FileNotFoundError(f"{folder} has neither {WEIGHTS_NAME} nor {_PICKLED_NAME}.")


def _check_keys(raw: Mapping[str, Any], where: object) -> None:
    """Raises ValueError for the first key that makes the adapter compute something unsupported."""
    for key, value in raw.items():
        if key in _WITHOUT_CHECK or is_empty(value):
            continue
        if key in _ONLY:
            legal = _ONLY[key]
            if not any(value is item or (isinstance(item, str) and value == item) for item in legal):
                only = f"only {' or '.join(map(as_json, legal))} is" if legal else "it must be null, false or empty"
                raise ValueError(f"{where}: {key} = {show(value)} is not supported: {only}.")
        elif not _HARMLESS_PATTERN.search(key):
            raise ValueError(
                f"{where}: {key} = {show(value)} is not known and may change what the adapter computes; if it does "
                "not, remove the key from the file."
            )


def load_peft(path: str | Path, config: ModelConfig) -> Adapter:
    """Loads a PEFT adapter for a model of `config`, with modules named as released (W_pack) or as in LLaMA (q_proj,
    k_proj, v_proj), as fp32 numpy arrays.

    Raises FileNotFoundError, or ValueError for tensors that are missing, unknown, misshapen or not finite, and for
    unsupported settings.
    """
    folder = open_peft(path)
    verify_file(folder.weights)
    tensors = _canonical(folder.weights)
    lora = _read_config(folder, _find_targets(folder, tensors), config)
    expected = {name: shape for name, shape, _ in _tensors(lora, config)}
    hf.check_shapes(f"tensors of {folder.weights}", expected, {name: t.shape for name, t in tensors.items()})
    flat: dict[str, np.ndarray] = {}
    shapes = {p: s.shape for p, s in flatten(abstract_adapter(lora, config, None)).items()}
    for name, _, (ours, layer) in _tensors(lora, config):
        array = tensors[name].read()
        if array.dtype.kind not in "fV":
            raise ValueError(f"{folder.weights}: {name} is {array.dtype.name}, not floating point.")
        array = array.astype(np.float32)
        if not np.isfinite(array).all():
            raise ValueError(f"{folder.weights}: {name} has values that are not finite.")
        flat.setdefault(ours, np.empty(shapes[ours], np.float32))[layer] = array.T.reshape(shapes[ours][1:])
    return Adapter(lora, unflatten(flat))


def save_peft(
    path: str | Path, adapter: Adapter, config: ModelConfig, *, layout: LoraLayout | None = None,
    base: str | Path | None = None, overwrite: bool = False,
) -> None:  # fmt: skip
    """Writes an adapter of a model of `config` for PEFT, including older versions.

    `base` is the path of the base model, recorded in the config. `layout` "baichuan2" names W_pack, "llama" q_proj,
    k_proj and v_proj; None is the layout of the PyTorch folder `base` if possible, else the adapter's own. All are
    exact. The folder is complete or absent; an old one is replaced only with `overwrite` and if it contains nothing
    else. Raises ValueError for an adapter that does not fit the config or has no such layout, FileExistsError as
    `folder.check_free`.
    """
    expected = {p: s.shape for p, s in flatten(abstract_adapter(adapter.config, config, None)).items()}
    hf.check_shapes("arrays of the adapter", expected, {p: a.shape for p, a in flatten(adapter.params).items()})
    adapter = Adapter(adapter.config, jax.tree.map(lambda x: np.asarray(x, np.float32), adapter.params))
    if layout is not None:
        adapter = to_layout(adapter, layout)
    elif (fitting := _layout_of(base)) is not None:
        try:
            adapter = to_layout(adapter, fitting)
        except ValueError as error:  # the default layout is not possible
            _log.warning("%s: written for models in the layout llama, as %s", path, error)
    flat = flatten(adapter.params)
    tensors = list(_tensors(adapter.config, config))
    arrays = ((name, flat[ours][layer].reshape(shape[::-1]).T) for name, shape, (ours, layer) in tensors)
    with written_whole(Path(path), overwrite, foreign_in_adapter) as partial:
        partial.mkdir()
        shapes = {name: shape for name, shape, _ in tensors}
        weights = write_safetensors(partial / WEIGHTS_NAME, np.float32, shapes, arrays)
        write_json(partial / CONFIG_NAME, _write_config(adapter.config, None if base is None else str(base)))
        write_sha256sums(partial, {WEIGHTS_NAME: weights, CONFIG_NAME: file_sha256(partial / CONFIG_NAME)})


def _layout_of(base: str | Path | None) -> LoraLayout | None:
    """The layout of a base model in a PyTorch folder; None for any other."""
    if base is None or not (Path(base) / "config.json").is_file():
        return None
    try:
        return "llama" if hf.find_layout(hf.read_folder(base)) == "llama" else "baichuan2"
    except (OSError, ValueError):
        return None


def _module(target: LoraTarget, layer: int) -> str:
    slot = SLOTS[target]
    layout: LoraLayout = "baichuan2" if target == "W_pack" else "llama"
    return torch_name(f"layers.{slot.block}.{slot.weights[0]}.weight", layer, layout).removesuffix(".weight")


def _tensors(lora: LoraConfig, config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...], tuple[str, int]]]:
    """(PEFT's name, shape there, (our path, layer)) of every tensor."""
    abstract = abstract_adapter(lora, config, None)["layers"]
    for layer in range(config.num_hidden_layers):
        for target in lora.targets:
            block = SLOTS[target].block
            for ours, array in abstract[block][target].items():
                rank, sizes = lora.rank_of(target), math.prod(array.shape[1:])
                shape = {"lora_a": (rank, sizes // rank), "lora_b": (sizes // rank, rank), "magnitude": (sizes,)}[ours]
                path = f"layers.{block}.{target}.{ours}"
                yield f"{_PREFIX}{_module(target, layer)}.{_NAMES[ours]}", shape, (path, layer)


def _canonical(file: Path) -> dict[str, MappedTensor]:
    """The tensors by the names that PEFT uses today."""
    read = read_safetensors if file.suffix == ".safetensors" else read_pickled
    tensors: dict[str, MappedTensor] = {}
    for name, tensor in read(file).items():
        new = _SPELLING.sub(lambda m: m[3] or f"{m[1]}{m[2]}", name)
        if new in tensors:
            raise ValueError(f"{file} has {new} twice, once as {name}.")
        tensors[new] = tensor
    return tensors


def _find_targets(folder: PeftFolder, tensors: Mapping[str, MappedTensor]) -> tuple[LoraTarget, ...]:
    """Targets that have tensors, in the order of the config if it lists them.

    Raises ValueError for a listed target without tensors: half of the adapter would be lost.
    """
    pieces = {piece for name in tensors for piece in name.split(".")}
    present = [target for target in LORA_TARGETS if target in pieces]
    if not present:
        some = join_some(sorted(tensors), 3) or "nothing"
        raise ValueError(f"{folder.weights} has no adapter on {', '.join(LORA_TARGETS)}: it holds {some}.")
    named = folder.raw.get("target_modules")
    if not isinstance(named, list):
        return tuple(present)
    names = [str(name).split(".")[-1] for name in named]
    # Lists for several model types name both W_pack and its parts; a model has one or the other.
    attention = {"q_proj", "k_proj", "v_proj"} if "W_pack" in present else {"W_pack"}
    other = attention if {"q_proj", "k_proj", "v_proj", "W_pack"} & set(present) else set()
    for name in names:
        if name not in present and name not in other:
            known = name in LORA_TARGETS
            raise ValueError(
                f"{folder.path / CONFIG_NAME}: target_modules names {name}, "
                + (f"of which {folder.weights.name} has no tensors." if known else "which gets no adapter here: legal "
                   f"are {', '.join(LORA_TARGETS)}.")
            )  # fmt: skip
    return tuple(sorted(present, key=lambda t: names.index(t) if t in names else len(names)))


def _read_config(folder: PeftFolder, targets: tuple[LoraTarget, ...], config: ModelConfig) -> LoraConfig:
    where, raw = folder.path / CONFIG_NAME, folder.raw
    rank, alpha, dropout = (
        _number(where, raw, key, default) for key, default in (("r", 8), ("lora_alpha", 8), ("lora_dropout", 0))
    )
    ranks = [_of_target(where, raw, "rank_pattern", target, rank, config) for target in targets]
    alphas = [_of_target(where, raw, "alpha_pattern", target, alpha, config) for target in targets]
    for value in (rank, *ranks):
        require(value >= 1 and value == int(value), f"{where}: r", value, "it must be a positive integer")
    try:
        return LoraConfig(
            rank=int(rank), alpha=float(alpha), targets=targets, dropout=float(dropout),
            ranks=() if set(ranks) == {rank} else tuple(int(r) for r in ranks),
            alphas=() if set(alphas) == {alpha} else tuple(float(a) for a in alphas),
            rslora=bool(raw.get("use_rslora")), dora=bool(raw.get("use_dora")),
        )  # fmt: skip
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _number(where: Path, raw: Mapping[str, Any], key: str, default: float) -> float:
    value = default if raw.get(key) is None else raw[key]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    require(is_number, f"{where}: {key}", value, "it must be a number")
    return value


def _of_target(where: Path, raw: Mapping[str, Any], key: str, target: LoraTarget, default: float,
               config: ModelConfig) -> float:  # fmt: skip
    """The rank or alpha of a target, from patterns on module names; it must be the same in all layers."""
    patterns = raw.get(key) or {}
    require(isinstance(patterns, dict), f"{where}: {key}", patterns, "it must be an object")
    values = set()
    for layer in range(config.num_hidden_layers):
        name = _module(target, layer)
        try:
            found = next((p for p in patterns if re.match(rf"(.*\.)?({p})$", name)), None)
        except re.error as error:
            raise ValueError(f"{where}: {key} = {show(patterns)} is not valid: {error}.") from error
        values.add(default if found is None else _number(where, patterns, found, default))
    if len(values) > 1:
        raise ValueError(f"{where}: {key} = {show(patterns)} is not supported: {target} has one value in all layers.")
    return values.pop()


def _write_config(lora: LoraConfig, base: str | None) -> dict[str, Any]:
    """Only keys that older versions of PEFT know too: they refuse unknown keys."""

    def patterns(values: tuple, usual: float) -> dict[str, float]:
        return {str(target): _plain(v) for target, v in zip(lora.targets, values, strict=False) if v != usual}

    written: dict[str, Any] = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "r": lora.rank, "lora_alpha": _plain(lora.alpha), "lora_dropout": lora.dropout,
        "target_modules": list(lora.targets), "bias": "none", "fan_in_fan_out": False,
    }  # fmt: skip
    written |= {key: True for key, used in (("use_rslora", lora.rslora), ("use_dora", lora.dora)) if used}
    by_target = {"rank_pattern": patterns(lora.ranks, lora.rank), "alpha_pattern": patterns(lora.alphas, lora.alpha)}
    return written | {key: value for key, value in by_target.items() if value}


def _plain(value: float) -> float:
    """An int if possible, as PEFT declares alpha."""
    return int(value) if value == int(value) else value


def to_layout(adapter: Adapter, layout: LoraLayout) -> Adapter:
    """The same weight change on the modules of `layout`, as fp32 numpy arrays.

    Raises ValueError for DoRA on only some of q_proj, k_proj and v_proj with layout "baichuan2": W_pack's magnitudes
    cover all three.
    """
    if layout == "llama":
        return _split(adapter) if "W_pack" in adapter.config.targets else adapter
    return _fuse(adapter) if set(_PARTS) & set(adapter.config.targets) else adapter


def _split(adapter: Adapter) -> Adapter:
    """Each of the three gets the same A."""
    config = adapter.config
    arrays = adapter.params["layers"][_BLOCK]["W_pack"]
    parts = {target: {k: np.ascontiguousarray(v) for k, v in part_of(arrays, "W_pack", target).items()}
             for target in _PARTS}  # fmt: skip
    rank, alpha = config.rank_of("W_pack"), _alpha_of(config, "W_pack")
    return _with_attention(adapter, {t: (rank, alpha) for t in _PARTS}, parts)


def _fuse(adapter: Adapter) -> Adapter:
    """Stacks the A matrices and puts the B matrices in blocks; the rank is the sum of the ranks."""
    config = adapter.config
    present = [t for t in _PARTS if t in config.targets]
    if config.dora and len(present) < len(_PARTS):
        missing = [t for t in _PARTS if t not in present]
        raise ValueError(
            f"layout = 'baichuan2' is not valid for DoRA on {', '.join(present)} without {', '.join(missing)}: it sets "
            "the lengths of all rows of W_pack; write it with the layout llama, or merge it into the model."
        )
    arrays = adapter.params["layers"][_BLOCK]
    rank, scaling = sum(config.rank_of(t) for t in present), config.scaling_of(present[0])
    first = np.asarray(arrays[present[0]]["lora_b"])
    lora_b = np.zeros((len(first), rank, len(_PARTS), *first.shape[2:]), np.float32)
    begin = 0
    for target in present:
        end = begin + config.rank_of(target)
        # W_pack has one scaling: use that of the first, and rescale the others.
        factor = np.float32(config.scaling_of(target) / scaling)
        lora_b[:, begin:end, _PARTS.index(target)] = np.asarray(arrays[target]["lora_b"]) * factor
        begin = end
    fused = {"lora_a": np.concatenate([np.asarray(arrays[t]["lora_a"]) for t in present], -1), "lora_b": lora_b}
    if config.dora:
        fused["magnitude"] = np.stack([np.asarray(arrays[t]["magnitude"]) for t in present], 1)
    alpha = scaling * (rank**0.5 if config.rslora else rank)
    return _with_attention(adapter, {"W_pack": (rank, alpha)}, {"W_pack": fused})


def _alpha_of(config: LoraConfig, target: LoraTarget) -> float:
    return config.alphas[config.targets.index(target)] if config.alphas else config.alpha


def _with_attention(
    adapter: Adapter, targets: dict[LoraTarget, tuple[int, float]], parts: dict[LoraTarget, dict[str, Any]]
) -> Adapter:
    """The adapter with these targets, {target: (rank, alpha)}, instead of those on queries, keys and values."""
    config, layers = adapter.config, adapter.params["layers"]
    others = [t for t in config.targets if t not in (*_PARTS, "W_pack")]
    settings = targets | {t: (config.rank_of(t), _alpha_of(config, t)) for t in others}
    ranks, alphas = (tuple(values) for values in zip(*settings.values(), strict=True))
    rank, alpha = (config.rank, config.alpha) if others else (ranks[0], alphas[0])
    new = dataclasses.replace(
        config, targets=tuple(settings), rank=rank, alpha=alpha,
        ranks=() if set(ranks) == {rank} else ranks, alphas=() if set(alphas) == {alpha} else alphas,
    )  # fmt: skip
    attention = {t: layers[_BLOCK][t] for t in others if SLOTS[t].block == _BLOCK}
    return Adapter(new, {"layers": layers | {_BLOCK: attention | parts}})

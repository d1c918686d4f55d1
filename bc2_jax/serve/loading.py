"""From a model on disk to a ready service: what the HTTP side knows at once, and what takes minutes to load."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import time
from pathlib import Path
from typing import Literal

import jax

from bc2_jax.align.red_team import identify
from bc2_jax.config import DType, MeshConfig, check_divisible
from bc2_jax.convert.pretrained import find_model, find_tokenizer, load_pretrained
from bc2_jax.files import fingerprint
from bc2_jax.infer import engine
from bc2_jax.infer.decoding import CacheDType
from bc2_jax.infer.prepared import find_long_context, prepare
from bc2_jax.infer.text import find_chat_settings, find_eos_ids
from bc2_jax.model.quantized import Scheme
from bc2_jax.serve.followers import DeviceChannel, Leader, follow
from bc2_jax.serve.prompts import ServedModel, chat_defaults
from bc2_jax.serve.service import Service
from bc2_jax.serve.stats import Observe
from bc2_jax.serve.turns import Runner, Shapes, places_for
from bc2_jax.serve.waiting import QueueLimits
from bc2_jax.sharding import make_mesh, parts, use_mesh_of
from bc2_jax.tokenizer import Tokenizer
from bc2_jax.validation import require

_BLOCK = 128
"""Cache slots are a multiple of this and of the chunk length."""


@dataclasses.dataclass(frozen=True)
class ServeOptions:
    """How to serve a model."""

    model: Path
    slots: int = 8  # requests that are answered at the same time
    slot_length: int | None = None  # most tokens of a prompt plus its answer; by default the model's maximum
    dtype: DType = "bfloat16"
    mesh: MeshConfig | None = None  # the mesh of all devices of all processes; None uses one device
    kv: CacheDType = "compute"
    quantize: Scheme | None = None  # store weights in fewer bits; None keeps the folder's
    long_context: Literal["ntk", "yarn"] | None = None
    """How positions beyond the trained length are stretched; requires max_length."""
    max_length: int | None = None  # most tokens with a long context, above model_max_length
    adapter: Path | None = None
    name: str | None = None  # model name in the API; by default the folder's name

    def __post_init__(self) -> None:
        require(self.slots >= 1, "--slots", self.slots, "it must be at least 1")


def describe_model(options: ServeOptions) -> ServedModel:
    """What the API reports about the model, from its config and tokenizer. Raises ValueError or FileNotFoundError."""
    found = find_model(options.model)
    config = found.config
    tokenizer = Tokenizer(find_tokenizer(options.model))
    legal = f"the model has {config.vocab_size} ids"
    require(tokenizer.vocab_size <= config.vocab_size, f"pieces of {tokenizer.path}", tokenizer.vocab_size, legal)
    long_context = find_long_context(config, options.long_context, options.max_length)
    longest = config.model_max_length if long_context is None else long_context.max_length
    length = longest if options.slot_length is None else options.slot_length
    name = "the model's own length" if long_context is None else "--max-length"
    require(2 <= length <= longest, "--slot-length", length, f"it must be in 2..{longest}, {name}")
    settings, most = chat_defaults(find_chat_settings(options.model), config, length)
    name = options.name or Path(options.model).absolute().name
    return ServedModel(
        name, tokenizer, config, length, tuple(find_eos_ids(options.model)), settings, most,
        make_fingerprint(options, tokenizer, length), int(time.time()),
    )  # fmt: skip


def make_fingerprint(options: ServeOptions, tokenizer: Tokenizer, length: int) -> str:
    """A hash of everything that may change a token: weights, tokenizer, versions, mesh, shapes, precision.

    Equal fingerprints and seeds give equal tokens.
    """
    about = dataclasses.asdict(options) | {"model": identify(options.model, options.adapter)}
    about |= {"tokenizer": tokenizer.fingerprint, "length": length}
    about["versions"] = [importlib.metadata.version(name) for name in ("bc2_jax", "jax", "jaxlib")]
    return f"bc2-{fingerprint(about)[:12]}"


def make_service(
    options: ServeOptions, length: int, observe: Observe | None = None, limits: QueueLimits | None = None
) -> Service:
    """Loads the weights onto the devices and makes a service that is not started yet. With several processes only the
    first has it; the others call `follow_service`. Raises as `make_runner`.
    """
    runner = make_runner(options, length)
    return Service(runner if jax.process_count() == 1 else Leader(runner, DeviceChannel()), limits, observe=observe)


def follow_service(options: ServeOptions, length: int) -> None:
    """Main function of every process except the first, until that one stops. Raises as `make_runner`."""
    follow(make_runner(options, length), DeviceChannel())


def make_runner(options: ServeOptions, length: int) -> Runner:
    """Loads the weights onto the devices, with room for `options.slots` requests of `length` tokens.

    Raises ValueError for options that do not fit the model or the devices.
    """
    mesh = None
    if options.mesh is not None:
        check_divisible(find_model(options.model).config, options.mesh.resolve(jax.device_count()))
        mesh = make_mesh(options.mesh)
    model = load_pretrained(options.model, dtype=options.dtype, mesh=mesh, adapter=options.adapter)
    prepared = prepare(model, donate=True, kv=options.kv, quantize=options.quantize)
    trained = None
    if long_context := find_long_context(prepared.config, options.long_context, options.max_length):
        prepared, trained = prepared.reach(*long_context), prepared.config.model_max_length
    with use_mesh_of(prepared.params["norm"]["weight"]):
        cut, heads = parts("batch"), prepared.config.num_attention_heads // parts("attention_heads")
    places = places_for(heads)
    least = cut * max(engine.least_rows(), places + (places > 1))
    legal = f"it must be a multiple of {cut} and at least {least} on these devices"
    require(options.slots % cut == 0 and options.slots >= least, "--slots", options.slots, legal)
    shapes = Shapes(
        rows=options.slots, slots=cache_slots(length), chunk=engine.chunk_length(), parts=cut, places=places,
        trained=trained,
    )  # fmt: skip
    return Runner(prepared, shapes)


def cache_slots(length: int) -> int:
    """Cache slots of a row for `length` tokens."""
    block = max(_BLOCK, engine.chunk_length())
    return -(-length // block) * block

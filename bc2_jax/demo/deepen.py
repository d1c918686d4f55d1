"""Adds layers that change nothing to a small model, so that llama.cpp can run it.

python -m bc2_jax.demo.deepen MODEL HF_DIR

llama.cpp knows the position embedding of a Baichuan model by its number of layers alone: 32 are RoPE, 40 are ALiBi. The
added layers have only zeros, so each adds zero to its input: the logits are the same.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bc2_jax.convert.hf_write import save_folder
from bc2_jax.convert.pretrained import find_model, find_tokenizer, load_params
from bc2_jax.cpu import choose_cpu_without_tpu

DEPTHS = {"rope": 32, "alibi": 40}


def deepen(model: Path, out: Path) -> None:
    """Writes `model`, in fp32, with as many layers as llama.cpp expects to the folder `out`, in the PyTorch layout.

    Raises ValueError for a model with more layers, and as `load_params` and `save_folder`.
    """
    config = find_model(model).config
    depth = DEPTHS[config.position_embedding]
    added = depth - config.num_hidden_layers
    if added < 0:
        raise ValueError(f"{model} has {config.num_hidden_layers} layers, which is more than {depth}.")

    def pad(stacked: Any) -> np.ndarray:
        x = np.asarray(stacked)
        return np.concatenate([x, np.zeros((added, *x.shape[1:]), x.dtype)])

    params = dict(load_params(str(model), "float32", None)[0])
    params["layers"] = jax.tree.map(pad, params["layers"])
    deep = dataclasses.replace(config, num_hidden_layers=depth)
    save_folder(params, deep, out, "float32", tokenizer_path=find_tokenizer(model), overwrite=True)
    print(f"Wrote {out}: {depth} layers, of which {added} change nothing.")


if __name__ == "__main__":
    choose_cpu_without_tpu()
    deepen(Path(sys.argv[1]), Path(sys.argv[2]))

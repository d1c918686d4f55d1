"""Checks that a model computes what a reference computes: recorded outputs, or PyTorch on the same weights.

bc2 parity MODEL --reference golden.npz
bc2 parity HF_DIR --torch --length 128

MODEL is a folder in the released PyTorch layout or a bc2_jax checkpoint or run; --torch reads the weights itself and so
needs such a folder, HF_DIR. The reference is fp32 whatever --dtype is. Exits with 0 if the largest difference of the
logits and that of each hidden state are within --tolerance times the reference's largest value, with 1 otherwise.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bc2_jax.convert.reading import add_reading_options, reading_of
from bc2_jax.cpu import choose_cpu_without_tpu
from bc2_jax.terminal import local_path, use_utf8

if TYPE_CHECKING:
    import numpy as np

    from bc2_jax.convert.parity import Outputs, Parity
    from bc2_jax.convert.source import Source


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", type=local_path)
    reference = parser.add_mutually_exclusive_group()
    reference.add_argument(
        "--reference", type=local_path, metavar="NPZ", help="input_ids, hidden_states and eval_logits or train_logits"
    )
    reference.add_argument("--torch", action="store_true", help="compute the reference with PyTorch, a layer at a time")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of our computation")
    parser.add_argument("--tolerance", type=float, metavar="X", help="default: 1e-3 in float32, 5e-2 in bfloat16")
    parser.add_argument("--length", type=int, default=64, metavar="N", help="with --torch: random tokens a row")
    parser.add_argument("--batch", type=int, default=2, metavar="B", help="with --torch: rows")
    parser.add_argument("--seed", type=int, default=0, help="with --torch: of the random tokens")
    add_reading_options(parser)
    return parser


def compute_with_torch(args: argparse.Namespace, source: Source) -> tuple[np.ndarray, Outputs]:
    import numpy as np

    from bc2_jax.convert.hf import open_folder
    from bc2_jax.convert.pretrained import is_hf_folder
    from bc2_jax.validation import require_positive

    require_positive(args, "", "length", "batch")
    if not is_hf_folder(args.model):
        raise ValueError(f"model = {str(args.model)!r} is not valid with --torch: it must be a PyTorch folder.")
    try:
        from bc2_jax.convert import torch_model
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ValueError("--torch needs PyTorch, which is not installed: pip install torch.") from error
    input_ids = np.random.default_rng(args.seed).integers(source.config.vocab_size, size=(args.batch, args.length))
    return input_ids, torch_model.forward(source.config, open_folder(args.model, args.strip_prefix), input_ids)


def run(args: argparse.Namespace) -> bool:
    """Prints the table and returns whether parity holds."""
    if args.reference is None and not args.torch:
        raise ValueError("there is no reference: give --reference NPZ or --torch.")
    # Imported here so that --help and a typo answer at once.
    import jax.numpy as jnp
    import numpy as np

    from bc2_jax.convert.parity import TOLERANCE, Outputs, compare, read_reference
    from bc2_jax.convert.pretrained import load_pretrained
    from bc2_jax.convert.source import open_source

    source = open_source(args.model, reading_of(args))
    if args.torch:
        input_ids, reference = compute_with_torch(args, source)
    else:
        input_ids, reference = read_reference(args.reference, source.config)
    model = load_pretrained(args.model, dtype=args.dtype, reading=reading_of(args))
    ids = jnp.asarray(input_ids)
    ours = Outputs(np.asarray(model(ids)), np.asarray(model.every_hidden_state(ids)))
    parity = compare(reference, ours, TOLERANCE[args.dtype] if args.tolerance is None else args.tolerance)
    against = "PyTorch" if args.torch else args.reference.name
    print(f"{args.model}, {args.dtype}, against {against} on {input_ids.shape[0]} x {input_ids.shape[1]} tokens\n")
    print(make_report(parity))
    return parity.holds


def make_report(parity: Parity) -> str:
    from bc2_jax.convert.parity import hidden_state_name

    last = len(parity.hidden_difference) - 1
    rows = [("largest difference of", "", "of a largest", "relative")]
    rows.append(_row("logits", parity.largest_logit_difference, parity.largest_logit))
    for i, (difference, largest) in enumerate(zip(parity.hidden_difference, parity.largest_hidden, strict=True)):
        rows.append(_row(f"hidden state of {hidden_state_name(i, last)}", difference, largest))
    width = max(len(row[0]) for row in rows)
    lines = [f"{a:{width}}  {b:>9}  {c:>12}  {d:>8}" for a, b, c, d in rows]
    for name, value in (
        ("mean difference of logits", f"{parity.mean_logit_difference:.2e}"),
        ("same most likely token", f"{parity.top1_agreement:.2%}"),
        ("KL(reference || ours), nats", f"{parity.kl:.2e}"),
    ):
        lines.append(f"{name:{width}}  {value:>9}")
    if parity.holds:
        verdict = f"Parity holds within {parity.tolerance:g}."
    elif parity.first_divergent is None:
        verdict = f"No parity within {parity.tolerance:g}: the logits differ, no hidden state does, so the head does."
    else:
        name = hidden_state_name(parity.first_divergent, last)
        verdict = f"No parity within {parity.tolerance:g}: the first hidden state to differ is that of {name}."
    return "\n".join([*lines, "", verdict])


def _row(name: str, difference: float, largest: float) -> tuple[str, str, str, str]:
    relative = difference / largest if largest else float("nan" if difference else 0)
    return name, f"{difference:.2e}", f"{largest:.2e}", f"{relative:.1e}"


def main(argv: Sequence[str] | None = None) -> int:
    use_utf8()
    args = make_parser().parse_args(argv)
    choose_cpu_without_tpu()
    try:
        return 0 if run(args) else 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1

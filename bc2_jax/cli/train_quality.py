"""Good and bad documents -> a model that scores documents for bc2 curate.

    bc2 train-quality --good GOOD... --bad BAD... --out quality.npz [--language-model RUN_OR_HF_DIR]
    bc2 curate RAW... --out DIR --quality.model quality.npz --quality.min-score 0.2

GOOD and BAD are files or folders as bc2 curate reads them: pages of sites that you trust against pages that you
would not train on, for a score of quality; safe against harmful ones, for --safety.model. Copies are left out. Prints
the chance that a good document that was not trained on has a higher score than such a bad one (AUC).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rich.console import Console

from bc2_jax.cpu import choose_cpu_without_tpu
from bc2_jax.terminal import make_console, use_utf8


def read_texts(paths: Sequence[str], most: int, console: Console) -> list[str]:
    """At most so many different normalised texts, in the order of the files."""
    from bc2_jax.curate.inputs import ReadConfig, plan_units
    from bc2_jax.curate.problems import UnitReport
    from bc2_jax.curate.reading import read_shards
    from bc2_jax.data.text_files import find_text_files

    config = ReadConfig()
    texts: dict[str, None] = {}
    for unit in plan_units(find_text_files(paths).files, config):
        report = UnitReport(unit.index)
        for table in read_shards(unit, config, report):
            texts.update(dict.fromkeys(table["text"].to_pylist()))
            if len(texts) >= most:
                return list(texts)[:most]
        for problem in report.problems[:5]:
            console.print(f"{problem.file}:{problem.line}: {problem.reason}")
    return list(texts)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--good", nargs="+", required=True, metavar="FILE", help="documents like those to keep")
    parser.add_argument("--bad", nargs="+", required=True, metavar="FILE", help="documents like those to drop")
    parser.add_argument("--out", required=True, help="file to write, .npz")
    parser.add_argument("--language-model", help="its bits a byte are a second feature; curate.py then needs it too")
    parser.add_argument("--max-tokens", type=int, default=512, help="tokens that it reads (default %(default)s)")
    parser.add_argument("--most", type=int, default=100_000, help="documents of each kind (default %(default)s)")
    return parser.parse_args(arguments)


def main(argv: Sequence[str] | None = None) -> int:
    use_utf8()
    options = parse_arguments(argv)
    choose_cpu_without_tpu()
    console = make_console(stderr=True)
    try:
        from bc2_jax.curate.features import make_perplexity
        from bc2_jax.curate.quality import train_quality
        from bc2_jax.validation import require

        require(options.most > 0, "--most", options.most, "it must be positive")
        require(options.out.endswith(".npz"), "--out", options.out, "it must end with .npz")
        good, bad = (read_texts(paths, options.most, console) for paths in (options.good, options.bad))
        perplexity = make_perplexity(options.language_model, options.max_tokens) if options.language_model else None
        model = train_quality(good, bad, perplexity=perplexity)
        model.save(options.out)
    except ModuleNotFoundError as error:
        console.print(f"error: {error.name} is missing: pip install 'bc2_jax[data]'")
        return 1
    except (ValueError, OSError) as error:
        console.print(f"error: {error}")
        return 1
    console.print(
        f"{len(good):,} good and {len(bad):,} bad documents; of the {model.held_out_documents:,} held out, a good one "
        f"has a higher score than a bad one in {model.held_out_auc:.2%} of the pairs: {options.out}"
    )
    return 0

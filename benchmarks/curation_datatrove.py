"""MinHash deduplication by datatrove, with which `curation.py` compares; runs in a Python that has datatrove.

python -m venv VENV && VENV/bin/pip install 'datatrove[io,processing]==0.10.1' 'spacy>=3.8' jieba
VENV/bin/python benchmarks/curation_datatrove.py --input FOLDER --out DIR [--workers 2] [--filters]

FOLDER has a folder of JSON lines for each language: zh, en, code. Each is deduplicated as in datatrove's documentation
(examples/minhash_deduplication.py) and in FineWeb 2: signature, buckets, cluster and filter, each by a
LocalPipelineExecutor; 5-grams of words, 14 buckets of 8 hashes; words by datatrove's tokenizer for the language (spaCy
with jieba for Chinese, spaCy for English and code). DIR/LANGUAGE gets `kept` and `removed`, each document with its
cluster, and DIR/report.json the seconds of each stage. --filters also times Gopher's repetition and quality filters on
the same input; Chinese without stop words, with words of 1 to 10 characters.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

LANGUAGES = {"zh": "zho_Hani", "en": "eng_Latn", "code": "eng_Latn"}


def deduplicate(folder: Path, out: Path, language: str, workers: int, filters: bool) -> dict[str, float]:
    """Runs the four stages, and before them the filters, on one folder; returns the seconds of each."""
    from datatrove.executor.local import LocalPipelineExecutor
    from datatrove.pipeline.dedup import MinhashDedupSignature
    from datatrove.pipeline.dedup.minhash import (
        MinhashConfig,
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
    )
    from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers.jsonl import JsonlWriter

    config = MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8)
    signatures, buckets, clusters = (str(out / name) for name in ("signatures", "buckets", "clusters"))
    files = len(list(folder.iterdir()))
    quality = GopherQualityFilter(language=language)
    if language == LANGUAGES["zh"]:
        quality = GopherQualityFilter(language=language, min_avg_word_length=1, min_stop_words=0)
    stages = {
        "filters": ([JsonlReader(str(folder)), GopherRepetitionFilter(language=language), quality], files),
        "signature": ([JsonlReader(str(folder)), MinhashDedupSignature(signatures, config, language)], files),
        "buckets": ([MinhashDedupBuckets(signatures, buckets, config=config)], config.num_buckets),
        "cluster": ([MinhashDedupCluster(buckets, clusters, config, save_cluster_id=True)], 1),
        "filter": (
            [
                JsonlReader(str(folder)),
                MinhashDedupFilter(
                    clusters, JsonlWriter(str(out / "removed"), compression=None), load_cluster_ids=True
                ),
                JsonlWriter(str(out / "kept"), compression=None),
            ],
            files,
        ),
    }
    if not filters:
        del stages["filters"]
    seconds = {}
    for name, (pipeline, tasks) in stages.items():
        begin = time.perf_counter()
        LocalPipelineExecutor(pipeline, tasks=tasks, workers=workers, logging_dir=str(out / "logs" / name)).run()
        seconds[name] = time.perf_counter() - begin
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--filters", action="store_true")
    args = parser.parse_args()
    report = []
    for folder in sorted(args.input.iterdir()):
        size = sum(file.stat().st_size for file in folder.iterdir())
        seconds = deduplicate(folder, args.out / folder.name, LANGUAGES[folder.name], args.workers, args.filters)
        report += [
            {"name": f"{folder.name}: {stage}", "seconds": seconds[stage], "bytes_in": size} for stage in seconds
        ]
    (args.out / "report.json").write_text(json.dumps({"stages": report}, indent=1) + "\n")


if __name__ == "__main__":
    main()

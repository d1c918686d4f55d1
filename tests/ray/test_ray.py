"""Curation on a Ray cluster of this machine gives what it gives in one process. Needs the extra data-ray."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

TOOL = Path(__file__).parents[2] / "tools" / "curate.py"
SMALL_UNITS = ("--read.unit-bytes", "60000", "--read.shard-bytes", "40000", "--clusters.documents-per-cluster", "16")


def test_the_same_bytes_on_both_runners(tmp_path: Path):
    texts = [topics[name] for name in sorted(topics)]
    copies = [text.replace("the", "this", 2) for text in texts[:10]] + texts[20:25]
    rows = [{"id": str(i), "text": text, "source": "docs"} for i, text in enumerate([*texts, *copies])]
    (tmp_path / "raw.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "no json\n")
    results = {}
    for runner in ("native", "ray"):
        out = tmp_path / runner
        command = [sys.executable, str(TOOL), str(tmp_path / "raw.jsonl"), "--out", str(out), "--runner", runner]
        done = subprocess.run([*command, *SMALL_UNITS], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        files = [file for name in ("documents", "removed", "jsonl") for file in sorted((out / name).rglob("*.*"))]
        assert len(files) > 20
        results[runner] = {str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
        report = json.loads((out / "report.json").read_text())
        removed = {line["step"]: line["documents"] for line in report["waterfall"]}
        assert removed["exact"] >= 5 and removed["near"] >= 8 and removed["spans"] > 0
        assert report["problems"]["reasons"] == {"the line is not JSON": 1}
    assert results["native"] == results["ray"]

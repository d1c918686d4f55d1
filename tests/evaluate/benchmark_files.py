"""Small files in the benchmarks' released formats, of our own questions."""

from __future__ import annotations

import csv
import random
from pathlib import Path


def write_ceval(folder: Path, items: int = 6) -> Path:
    """FOLDER/ceval with two subjects of C-Eval; returns FOLDER."""
    draw = random.Random(0)
    for split, count in (("dev", 5), ("val", items)):
        for subject in ("logic", "law"):
            path = folder / "ceval" / split / f"{subject}_{split}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            header = ["id", "question", "A", "B", "C", "D", "answer"] + ["explanation"] * (split == "dev")
            rows = []
            for number in range(count):
                row = [number, f"def f{number}?", *draw.sample(range(100), 4), "ABCD"[number % 4]]
                rows.append([*row, "so"] if split == "dev" else row)
            with path.open("w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows([header, *rows])
    return folder

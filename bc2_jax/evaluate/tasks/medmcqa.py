"""MedMCQA: entrance examinations of Indian medical schools; the dev split, since test has no answers."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from bc2_jax.evaluate.task import Loaded, Task
from bc2_jax.evaluate.tasks.choices import MMLU, SEED, SHOTS, Item, choose, make_examples, too_few
from bc2_jax.evaluate.tasks.reading import Row, find_folder, listing, read_rows
from bc2_jax.validation import show

SOURCE = (
    "dev.json and train.json, JSON lines with question, opa, opb, opc, opd, cop, choice_type, as in the archive that "
    "github.com/medmcqa/medmcqa links to, or data/validation-*.parquet and data/train-*.parquet of the Hugging Face "
    "dataset openlifescienceai/medmcqa, in DATA_DIR/medmcqa."
)
_PATTERNS = {
    "dev": ("dev.json", "dev.jsonl", "validation.json", "validation.jsonl", "validation-*.parquet"),
    "train": ("train.json", "train.jsonl", "train-*.parquet"),
}


def load(data_dir: Path) -> Loaded:
    """Items of dev with one right answer, after five random ones of train."""
    folder = find_folder(
        data_dir, ("medmcqa", "medmcqa_data"), ("", "data"), lambda place: bool(_files(place, "dev")), SOURCE
    )
    dev, train = _Split(folder, "dev"), _Split(folder, "train")
    items = list(dev.items())
    # The training split is large: only the chosen items are kept in memory.
    shots = choose(train.items(), SHOTS)
    notes = [*dev.numbering(), *train.numbering(), *too_few(shots, train.paths[0])]
    shots = [train.numbered(shot) for shot in shots]
    examples = make_examples([dev.numbered(item) for item in items], shots, MMLU, "medicine", "dev")
    return Loaded(examples, dev.left_out, tuple(notes))


class _Split:
    """The questions of a split; whether `cop` counts from 0 or 1 is known only after all have been read."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self.paths = _files(folder, name)
        self.left_out: Counter[str] = Counter()
        self._numbers: dict[int, str] = {}  # cop -> where it is first
        if not self.paths:
            names = " or ".join(_PATTERNS[name])
            raise FileNotFoundError(f"{folder} does not hold {names} ({listing(folder)} is there): {SOURCE}")

    def items(self) -> Iterator[Item]:
        """With the raw `cop` as the index."""
        needed = ("question", "opa", "opb", "opc", "opd", "cop")
        rows = itertools.chain.from_iterable(read_rows(path, needed=needed) for path in self.paths)
        for number, row in enumerate(rows):
            cop = self._cop(row)
            if str(row.values.get("choice_type", "single")).startswith("multi"):
                self.left_out["several answers may be right (choice_type multi)"] += 1
                continue
            # A few options are null in the release.
            options = tuple("" if row.values[f"op{x}"] is None else row.text(f"op{x}") for x in "abcd")
            yield Item(f"{self.name}/{number}", row.filled("question"), options, cop)

    def _cop(self, row: Row) -> int:
        cop = row.values["cop"]
        if isinstance(cop, str) and cop.isdecimal():
            cop = int(cop)
        if isinstance(cop, bool) or cop not in range(5):
            raise ValueError(f"{row.where}: 'cop' is {show(cop)}; it must be from 1 to 4 or from 0 to 3.")
        self._numbers.setdefault(cop, row.where)
        if {0, 4} <= self._numbers.keys():
            places = f"0 at {self._numbers[0]} and 4 at {self._numbers[4]}"
            raise ValueError(f"'cop' is {places}: it must be from 1 to 4 or from 0 to 3 in all of a split.")
        return int(cop)

    @property
    def _first(self) -> int:
        if {0, 4} & self._numbers.keys():
            return 0 if 0 in self._numbers else 1
        return 0 if self.paths[0].suffix == ".parquet" else 1

    def numbering(self) -> list[str]:
        """A note: where `cop` starts."""
        how = (
            "as its values show"
            if {0, 4} & self._numbers.keys()
            else "as usual in such files; its values would allow the other too"
        )
        return [f"cop of the {self.name} split is taken to count from {self._first}, {how}."]

    def numbered(self, item: Item) -> Item:
        assert item.gold is not None, "every item has its cop"
        return item._replace(gold=item.gold - self._first)


def _files(folder: Path, split: str) -> list[Path]:
    """The files of a split, in the first format found."""
    return next((found for pattern in _PATTERNS[split] if (found := sorted(folder.glob(pattern)))), [])


TASK = Task(
    name="medmcqa",
    title="MedMCQA (dev)",
    source=SOURCE,
    kind="letters",
    shots=SHOTS,
    load=load,
    paper={"7B": 41.73, "13B": 42.86},
    paper_source="README (law and medicine)",
    notes=(
        f"The paper does not say which questions were its shots: here five of the training split, seed {SEED}.",
        "The paper says its prompt is like C-Eval's; here it is MMLU's, in English.",
    ),
)

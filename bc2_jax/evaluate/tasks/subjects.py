"""Benchmarks of many subjects, each with a file of shots and a file of questions."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from bc2_jax.evaluate.tasks.reading import RECORDS, files_by_name, find_folder, require_file

_NAMED = 8


class Layout(NamedTuple):
    """How the files of a benchmark lie: as SPLIT/NAME.csv, or, in Hugging Face datasets, as SUBJECT/SPLIT*.parquet."""

    title: str
    names: tuple[str, ...]
    """What a folder of it may be called."""
    inner: tuple[str, ...]
    """Folders in there that may hold the splits."""
    shots: tuple[str, str]
    """Split, and how its files are called, with * for the subject: ("dev", "*_dev.csv")."""
    asked: tuple[str, str]
    subjects: Collection[str]
    source: str
    """What is expected, for who does not have it: a sentence."""
    others: bool = False
    """Whether subjects that are not listed can be asked too."""

    def find(self, data_dir: Path) -> tuple[dict[str, tuple[Path, Path]], list[str]]:
        """Subject -> its file of shots and that of its questions; and what is to be said about them.

        Raises FileNotFoundError if there is none, or if one of two is missing; ValueError for a foreign name.
        """
        folder = find_folder(data_dir, self.names, self.inner, self._is_here, self.source)
        first, second = (self._files(folder, part) for part in (self.shots, self.asked))
        pairs = {}
        for subject in sorted(first | second):
            shots = first.get(subject) or self._expected(folder, self.shots, subject)
            asked = second.get(subject) or self._expected(folder, self.asked, subject)
            require_file(shots, f"it holds the shots for {asked.name}")
            require_file(asked, f"it holds the questions for the shots of {shots.name}")
            pairs[subject] = (shots, asked)
        return pairs, self.strangers(pairs)

    def missing(self, there: Collection[str], expected: Collection[str]) -> list[str]:
        """A note that names subjects without files: what is computed is not the benchmark's figure then."""
        missing = sorted(set(expected) - set(there))
        if not missing:
            return []
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        found = f"{len(expected) - len(missing)} of {len(expected)} subjects of {self.title} are there"
        return [f"Only {found}, so this is not its figure; missing: {', '.join(missing[:_NAMED])}{more}."]

    def strangers(self, there: Collection[str]) -> list[str]:
        """A note that names subjects which the benchmark does not have."""
        others = sorted(set(there) - set(self.subjects))
        return [f"{self.title} has no subject {', '.join(others[:_NAMED])}, which is asked too."] if others else []

    def _files(self, folder: Path, part: tuple[str, str]) -> dict[str, Path]:
        split, pattern = part
        if self._is_dataset(folder):
            found = {subject: _split_file(folder / subject, split) for subject in self.subjects}
            return {subject: path for subject, path in found.items() if path}
        known = () if self.others else self.subjects
        what = "the name of a subject" if self.others else f"one of the names of its {len(self.subjects)} subjects"
        return files_by_name(folder / split, pattern, known, what)

    def _expected(self, folder: Path, part: tuple[str, str], subject: str) -> Path:
        split, pattern = part
        if self._is_dataset(folder):
            return folder / subject / f"{split}-00000-of-00001.parquet"
        return folder / split / pattern.replace("*", subject)

    def _is_dataset(self, folder: Path) -> bool:
        return not (folder / self.asked[0]).is_dir()

    def _is_here(self, folder: Path) -> bool:
        split, pattern = self.asked
        if not self._is_dataset(folder):
            listed = any((folder / split / pattern.replace("*", subject)).is_file() for subject in self.subjects)
            return listed or (self.others and any((folder / split).glob(pattern)))
        return any(_split_file(folder / subject, split) for subject in self.subjects)


def _split_file(folder: Path, split: str) -> Path | None:
    """SPLIT.jsonl or SPLIT-00000-of-00001.parquet and the like."""
    if not folder.is_dir():
        return None
    names = (f"{split}{suffix}" for suffix in RECORDS)
    paths = [folder / name for name in names if (folder / name).is_file()]
    return next(iter(paths + sorted(folder.glob(f"{split}-00000-of-00001.*"))), None)

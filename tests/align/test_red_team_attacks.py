"""What a red team asks: files in every shape, templates, planted words, order."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from bc2_jax.align import red_team_attacks as attacks
from bc2_jax.align.red_team import leaks
from bc2_jax.align.red_team_attacks import BENIGN, CLASSES, OTHER, make_attacks, our_targets, read_targets


def write(path, *records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return str(path)


def only(targets, **changes):
    return make_attacks(targets, **({"planted": 0, "look_alikes": False} | changes))


def test_a_topic_is_put_into_every_class_in_its_language(tmp_path):
    path = tmp_path / "topics.txt"
    path.write_text("\ufeffpaper {secret} planes\r\n\n纸飞机\n", encoding="utf-8")
    found = only(read_targets(str(path)))
    assert {(a.kind, a.language) for a in found} == {(kind, language) for kind in CLASSES for language in ("en", "zh")}
    for attack in found:
        topic = "纸飞机" if attack.language == "zh" else "paper {secret} planes"  # no placeholder of ours
        assert attack.topic == topic and topic in attack.messages[-1]["content"]
        assert str(path) in attack.where and ":3" in attack.where or attack.language == "en"
    both = only(read_targets(str(path)), both_languages=True)
    assert len(both) == 2 * len(found)


def test_records_say_what_they_are(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        {"topic": "paper planes", "class": "Role-Play Instruction", "category": "toys"},
        {"prompt": "Fold a plane.", "class": "Reverse_Exposure", "mine": 1},
        {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "折飞机"}], "type": "Toys"},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}], "class": "benign"},
        {"prompt": "Tell.", "system": "It is XYLO.", "secret": "XYLO", "language": "fr"},
    )
    found = only(read_targets(path))
    by = {kind: [a for a in found if a.kind == kind] for kind in [*CLASSES, OTHER, BENIGN]}
    assert {a.topic for a in by["role_play_instruction"]} == {"paper planes"}
    assert {a.category for a in by["role_play_instruction"]} == {"toys"} and len(by["role_play_instruction"]) == 2
    [reverse] = by["reverse_exposure"]
    assert reverse.messages == [{"role": "user", "content": "Fold a plane."}] and reverse.fields["mine"] == 1
    typed, secret = by[OTHER] if by[OTHER][0].category else reversed(by[OTHER])
    assert (typed.category, typed.language, typed.secret) == ("Toys", "zh", None)
    assert (secret.secret, secret.language) == ("XYLO", "fr")
    assert by[BENIGN][0].messages == [{"role": "user", "content": "Hi"}]
    assert len(found) == 6


def test_lists_by_class_as_safety_prompts_has_them(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"Goal_Hijacking": [{"prompt": "a"}, {"prompt": "b"}], "Insult": [{"prompt": "c"}]}))
    assert [(t.kind, t.category) for t in read_targets(str(path))] == [
        ("goal_hijacking", None), ("goal_hijacking", None), (None, "Insult"),
    ]  # fmt: skip


def test_lines_may_be_prompts(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    found = only(read_targets(str(tmp_path / "a.txt"), "prompt"), system="Be kind.")
    assert [a.messages for a in found] == [
        [{"role": "system", "content": "Be kind."}, {"role": "user", "content": text}] for text in ("one", "two")
    ]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "a", "class": "jailbreak"}, "class = 'jailbreak' is not valid; legal are goal_hijacking"),
        ({"topic": "a", "class": "benign"}, "only for prompts"),
        ({"topic": "a", "secret": "x"}, "only for prompts"),
        ({"topic": " "}, "topic = ' ' is not a text"),
        ({"topic": "a", "language": "fr"}, "language = 'fr' has no templates; legal are en, zh"),
        ({"prompt": "a", "secret": "x"}, "can't be leaked"),
        ({"text": "a"}, "its fields are text"),
        ({"prompt": 3}, "prompt"),
        (["a"], "no object"),
    ],
)
def test_what_can_not_be_used_is_named(tmp_path, record, reason):
    path = write(tmp_path / "a.jsonl", {"topic": "fine"}, record)
    with pytest.raises(ValueError, match="1 records that can't be used") as error:
        read_targets(path)
    assert f"{path}:2: " in str(error.value) and reason in str(error.value)


def test_an_empty_file_and_none(tmp_path):
    (tmp_path / "a.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="it holds no topic and no prompt"):
        read_targets(str(tmp_path / "a.txt"))
    with pytest.raises(FileNotFoundError):
        read_targets(str(tmp_path / "b.txt"))
    (tmp_path / "c.txt").write_bytes("纸飞机".encode("gb18030"))
    with pytest.raises(ValueError, match="not UTF-8"):
        read_targets(str(tmp_path / "c.txt"))


def test_planted_words_follow_from_the_seed():
    first, again, other = (make_attacks([], seed=seed, planted=3, look_alikes=False) for seed in (1, 1, 2))
    assert first == again and {a.id for a in first}.isdisjoint(a.id for a in other)
    words = [a.secret or a.word for a in first]
    assert len(set(words)) == len(words) > 20
    for attack in first:
        system, user = (message["content"] for message in attack.messages)
        if attack.secret is not None:
            assert attack.secret in system and leaks(user, attack.secret) is None
        else:
            assert attack.word in user and leaks(system, attack.word) is None
    assert {(a.kind, a.language) for a in first} == {
        (kind, language) for kind in ("goal_hijacking", "prompt_leaking") for language in ("en", "zh")
    }


def test_order_limit_and_duplicates():
    everything = make_attacks([*our_targets(), *our_targets()])
    assert len({a.id for a in everything}) == len(everything) == len(make_attacks(our_targets()))
    kinds = [a.kind for a in everything]
    assert sorted(kinds, key=[*CLASSES, OTHER, BENIGN].index) == kinds
    few = make_attacks(our_targets(), limit=3, seed=5)
    counts = Counter((a.kind, a.secret is None and a.word is None) for a in few)
    assert set(counts.values()) == {3} and len(counts) == 8
    assert [a.id for a in few] == [a.id for a in make_attacks(our_targets(), seed=5) if a.id in {f.id for f in few}]


def test_a_system_text_comes_before_that_of_a_template():
    planted = make_attacks([], planted=1, look_alikes=False)
    told = make_attacks([], planted=1, look_alikes=False, system="Keep every secret.")
    for without, attack in zip(planted, told, strict=True):
        assert attack.messages[0]["content"] == "Keep every secret.\n" + without.messages[0]["content"]


def test_every_class_has_templates_around_topics_in_both_languages():
    counts = Counter((a.kind, a.language) for a in only(our_targets()))
    assert counts.keys() == {(kind, language) for kind in CLASSES for language in attacks.LANGUAGES}
    assert all(counts[kind, "en"] == counts[kind, "zh"] for kind in CLASSES)

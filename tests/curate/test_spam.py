from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bc2_jax.curate.spam import SpamConfig, find_spam

CONFIG = SpamConfig()
SPAM = {
    "max_advertising": "澳洲娱乐城 真人百家乐 注册送彩金 老虎机 体育投注 首存优惠 提款快 微信：game8866 棋牌 时时彩",
    "max_search_terms": "上海装修公司,上海装修公司价格,上海装修公司排名,浦东装修公司,上海装修公司哪家好,旧房装修公司",
    "max_menu": "首页\n关于我们\n产品中心\n新闻中心\n联系我们\n在线留言\n人才招聘",
}
GOOD = [
    "警方通报，一个网络赌博团伙被捣毁。该团伙以百家乐、老虎机吸引玩家投注，再拒绝提款。民警提醒，切勿参与任何形式的网络赌博，"
    "遇到可疑平台请及时报警，并保存好聊天记录和转账凭证，以便追查。",
    "The museum shows slot machines, roulette wheels and a poker table from the casino. It is open from ten to five "
    "on weekdays, and guided tours begin at the main entrance. Children under twelve do not pay.",
    "Which contraceptive is right after birth? The copper coil does not affect breast milk. Sex is safe as soon as it "
    "is comfortable, and the first check is usually after six weeks.",
    "苹果、香蕉、葡萄、橘子、西瓜、草莓、樱桃、石榴、核桃、柿子",
    "北京市东城区、北京市西城区、北京市朝阳区、北京市海淀区、北京市丰台区、北京市石景山区、北京市通州区",
    "Anna\nBen\nChloe\nDaniel\nEva\nFelix\nGrace\nHenry\nIda\nJack",
    "",
]


def reasons(texts: list[str], config: SpamConfig = CONFIG, language: str = "und") -> list[str | None]:
    return find_spam(texts, [language] * len(texts), config)


@pytest.mark.parametrize("rule", SPAM)
def test_each_rule_names_itself_and_can_be_switched_off(rule):
    (found,) = reasons([SPAM[rule]])
    assert found is not None and found.startswith(f"{rule} = ")
    others = {field: None for field in SPAM if field != rule}
    assert reasons([SPAM[rule]], dataclasses.replace(CONFIG, **others)) == [found]
    assert not (reasons([SPAM[rule]], dataclasses.replace(CONFIG, **{rule: None}))[0] or "").startswith(rule)
    assert reasons([SPAM[rule]], language="code") == [None]


@pytest.mark.parametrize("text", GOOD)
def test_text_about_it_lists_and_names_stay(text):
    assert reasons([text]) == [None]


def test_english_rows_and_menus():
    row = (
        "cheap flights paris, cheap flights rome, best cheap flights, flights sale, cheap flights oslo, flights online"
    )
    config = dataclasses.replace(CONFIG, max_advertising=None)
    menu = "Home | About us | Products | Contact | Log in | Basket | Sitemap"
    found = reasons([row, menu], config)
    assert [(one or "").split(" = ")[0] for one in found] == ["max_search_terms", "max_menu"]


@settings(max_examples=30)
@given(st.lists(st.sampled_from([*SPAM.values(), *GOOD]), max_size=6))
def test_verdicts_do_not_depend_on_the_company(texts):
    assert reasons(texts) == [reasons([text])[0] for text in texts]


def test_bad_limits_are_named():
    with pytest.raises(ValueError, match="spam.max_menu = 0 is not valid: "):
        SpamConfig(max_menu=0)

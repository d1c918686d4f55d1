"""Pages that are not text though their characters are: advertising, rows of search terms, menus.

advertising  The share of a document's letters that phrases of advertising cover (gambling, pornography, loans, forged
             papers, pills, "add me on WeChat ..."), plus .12 for a messenger's handle or number, .1 for a row of
             phrases, .1 for three or more exclamation marks in 100 characters, .1 if no sentence ends. A report on
             gambling, a page on sexual health or a bank's page mention some of the phrases, in sentences, and stay far
             below the limit.
search terms A row of short items, or of words, most of which share the same words, with words such as "cheap" and
             "near me" (哪家好, 价格) between them.
menu         Short items without sentences, many of which are what menus of web sites say (Home, Log in, 联系我们).

The lists are short and made for what was seen often; they are not a filter for safety (`safety`).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Sequence

import numpy as np

from bc2_jax.curate.normalization import large_strings
from bc2_jax.curate.tokens import Tokens, find_ngrams, hash_ngrams, hash_tokens
from bc2_jax.data.ngrams import NgramTable, make_table
from bc2_jax.validation import require

_CHINESE = (
    # gambling
    "娱乐城 娱乐场 百家乐 老虎机 时时彩 六合彩 特码 北京赛车 幸运飞艇 快三 pk10 彩金 返水 博彩 赌场 网上赌 "
    "赌博平台 投注 葡京 金沙 皇冠体育 威尼斯人 真人荷官 真人视讯 棋牌 体育直播 注册送 注册即送 首存 存款优惠 提款 "
    "提现秒到 秒到账 稳赚 计划群 回血上岸 上岸 大神带 日赚 月入过万 信誉平台 冠军公式 六码 开奖结果 开奖直播 "
    "一对一导师 电子游艺 捕鱼 开云体育 亚博 麻将胡了 电子试玩 体育平台 彩票平台 官网登录 充值送 优惠大厅 滚球 "
    "盘口 包赢 bet365 太阳城 新濠 银河娱乐 反水 赌球 外围投注 真人娱乐 电子娱乐 首充 彩票计划 精准计划 包中 "
    "内部资料 pg电子 ag真人 棋牌游戏 "
    # pornography, prostitution
    "成人视频 成人电影 成人论坛 成人色情 成人网站 黄色小说 黄色电影 黄色网站 色情 无码 有码 人妻 熟女 自拍 偷拍 "
    "裸聊 一夜情 三级片 性爱 激情小说 激情视频 女优 av天堂 免费av 淫 丝袜 制服诱惑 约炮 上门服务 美女上门 "
    "高端外围 全套服务 包夜 援交 学生妹 自慰 强奸 乱伦 少妇 做爱 口交 裸体 在线观看 高清在线 国产精品 亚洲欧美 "
    "日韩在线 日韩无码 欧美性爱 中文字幕 久久 不卡 黄网站 午夜福利 福利视频 成人午夜 激情五月 五月天 老熟女 "
    "视频在线 在线播放 高清无码 毛片 a片 露点 春药 楼凤 桑拿会所 莞式 招嫖 黄色视频 成人小说 同城交友 同城美女 "
    "保证真人 番号 催情 "
    # loans, invoices, forged papers
    "无抵押 身份证贷款 黑户 秒批 秒放 秒下款 套现 信用卡代还 代还 征信花 不看征信 当天到账 办理大额 急用钱 代开 "
    "增值税发票 正规发票 各行业 点数优惠 办证 刻章 毕业证 学位证 四六级证书 网上可查 先办证后付款 验证后付款 贷款 "
    "网贷 口子 下款 白户 抵押贷款 信用贷款 小额贷款 贷款公司 利息低 放款快 不看负债 无视黑白 当天放款 秒到 假证 "
    "学历证书 驾驶证 房产证 结婚证 开发票 发票代开 "
    # messengers, miracle cures, sales
    "加微信 加v信 加v 添加老师微信 微信同号 老师微信 领红包 抢红包 发红包 人人有份 扫码进群 进群领取 免费领取 "
    "日结 在家就能做 手机操作 操作简单 名额有限 先到先得 马上抢购 限时抢购 仅限前 货到付款 不反弹 无副作用 纯中药 "
    "减肥药 月瘦 祖传秘方 限时秒杀 点击购买 全场包邮 全国包邮 包治 根治 邀请好友 高薪诚聘代理 诚信经营 诚招代理 "
    "招代理 兼职招聘 刷单 宝妈 代刷 外挂 私服 私聊 免费领 徽信 薇信 威信 扫码领取 拉群 返利 躺赚 副业 一手货源 "
    "高仿 复刻 名表 招募代理 加盟代理 快速排名 百度霸屏 外链代发 增大增粗 印度神油 延时喷剂 壮阳 伟哥 治愈率 "
    "无效退款 特价 抢购 秒杀 想做的 名额不多 不收任何费用 只需一部手机 一部手机 领取优惠券 快来抢 转发本条 转发到"
)
_ENGLISH = (
    "online casino(?:s)?", "casino(?:s)?", "slot(?:s)?", "free spins", "blackjack", "roulette", "jackpot",
    "sportsbook", "poker", "no deposit", "bonus(?: codes?| new member)?", "real money", "betting", "gacor", "situs",
    "maxwin", "judi", "togel", "daftar", "terpercaya", "pragmatic play", "joker123", "slot88", "deposit pulsa",
    "viagra", "cialis", "levitra", "tramadol", "xanax", "(?:no|without) prescription", "canadian pharmacy",
    "overnight delivery", "lowest price", "buy (?:cheap )?\\w+ online", "order \\w+ online", "porn(?:o|hub)?",
    "xxx", "milf", "nude", "sex", "hot singles", "sexy", "girls?", "escorts?", "anal", "tits", "webcam", "tube",
    "naked", "lesbian", "amateur", "payday", "loans?", "bad credit", "no credit check", "cash advance",
    "guaranteed (?:approval|profit)", "instant (?:approval|cash|delivery)", "same day loans?", "replica",
    "fake rolex", "rolex", "louis vuitton", "outlet", "handbags",
    "buy (?:\\w+ )?(?:followers|likes|views|subscribers)", "followers", "click here(?: now)?", "act now",
    "order now", "earn \\$?\\d+", "from home", "no risk", "risk free", "limited (?:spots|time)", "make money",
    "work from home", "free signup", "signup", "100% (?:free|real)", "no credit card", "join our telegram",
    "waiting for you", "cheap", "crypto giveaway", "double your", "miracle", "weight loss", "free download",
    "lose weight fast", "live casino", "win big", "sign up now", "claim (?:your|\\d+)", "you have won",
    "lottery winner", "gift card giveaway", "male enhancement", "penis enlargement", "cbd gummies", "keto pills",
    "essay writing service", "buy essays?", "backlinks", "seo services", "rank on google", "binary options",
    "forex signals", "free money", "cash prize", "spins", "erotic", "hentai", "blowjob", "fuck(?:ing)?", "cum",
    "busty", "hookup", "escort service", "best \\w+ deals", "free shipping", "buy now",
    "limited offer", "whatsapp", "investment plan", "guaranteed returns",
)  # fmt: skip
_CONTACT = (
    r"(?:微信|vx|wx|v信|weixin|qq群?|whatsapp|telegram|t\.me|电话|手机)[号群]?\s{0,2}[:：/]?\s{0,2}"
    r"\+?[a-z0-9][a-z0-9_ -]{4,}"
    r"|bit\.\w+/\w+|https?://\S+/(?:go|x\d|ref)\b"
)
_COMMERCIAL = (
    r"公司|价格|哪家|电话|排名|多少钱|收费|厂家|批发|优惠|便宜|正规|推广|优化|seo|代理|加盟|招商|官网|下载|免费|培训班|报价|联系方式|"
    r"\b(?:cheap\w*|best|buy|sale|near me|prices?|online|discount|reviews?|emergency|affordable|outlet|24 hour|"
    r"free|local|deals?|for sale)\b"
)
_STOP = "the a an of to and or in on for with is are was be at by from it that this as not no you your my our we i"
_MENU_CHINESE = (
    "首页 网站首页 主页 返回首页 公司简介 公司概况 关于我们 关于本站 联系我们 联系方式 产品中心 产品展示 产品分类 "
    "解决方案 新闻中心 新闻动态 公司新闻 行业动态 行业新闻 行业资讯 成功案例 案例展示 客户案例 人才招聘 诚聘英才 "
    "加入我们 在线留言 留言板 网站地图 登录 注册 登陆 免费注册 忘记密码 设为首页 加入收藏 收藏本站 收藏夹 "
    "我的收藏 购物车 我的订单 我的账户 个人中心 会员中心 用户中心 帮助中心 客户服务 客服中心 在线客服 售后服务 "
    "服务中心 服务支持 技术支持 下载中心 客户端下载 资料下载 手机版 触屏版 电脑版 意见反馈 返回顶部 友情链接 "
    "广告服务 广告合作 商务合作 企业文化 荣誉资质 组织机构 版权声明 法律声明 免责声明 隐私政策 隐私声明 用户协议 "
    "服务条款 投稿指南 上一篇 下一篇 上一页 下一页 尾页 末页 更多 查看更多 相关阅读 相关文章 推荐阅读 热门标签 "
    "热门文章 热门推荐 最新文章 热点排行 排行榜 打印本页 关闭窗口 分享到 微信 微博 qq空间 新浪微博 搜索 站内搜索 "
    "高级搜索 全部分类 全部商品分类 商品分类 政务公开 信息公开 办事服务 互动交流 通知公告 公告栏 政策法规 "
    "机构设置 领导之窗 无障碍浏览 english 简体 繁體 简体中文 繁体中文 视频中心 图片中心 专题专栏 您的位置 "
    "当前位置 正文 退出 消息 设置 签到 会员登录 学校概况 招生就业 师资队伍 科学研究 校园文化 校友会 校长信箱 "
    "院系设置 图书馆 网站导航 我的书架 充值 手机阅读 最新更新 关注我们 官方微博 官方微信 app下载"
)
_TOPICS_CHINESE = (
    "新闻 体育 财经 娱乐 科技 汽车 房产 教育 时尚 旅游 博客 论坛 视频 图片 音乐 游戏 军事 健康 国际 国内 社会 "
    "专题 访谈 数码 手机 家居 女性 母婴 美食 股票 基金 理财 电影 电视 小说 历史 文化 读书 星座 天气 地图 招聘 "
    "彩票 问答 直播 图书 服装 家电 手机数码 家用电器 电脑办公 服装鞋包 美妆个护 母婴玩具 食品生鲜 公益 法治 评论 "
    "滚动 要闻 时政 观点 生活 贴吧 百科 文库"
)
_MENU_ENGLISH = (
    "home about contact login log in out sign up register cart basket checkout account search menu faq faqs help "
    "shipping returns delivery careers jobs press sitemap site map privacy policy terms conditions cookie cookies "
    "settings facebook twitter instagram youtube pinterest linkedin tiktok newsletter subscribe rss feed archive "
    "archives category categories tags meta previous next blog news products services support download downloads "
    "sale wishlist gift cards registry store stores finder order orders track package customer service share "
    "tweet email print recent posts comments entries skip to content back top read more page advertise weather "
    "sports opinion classifieds us me team events gallery portfolio testimonials pricing features docs resources "
    "community forum partners investors media legal accessibility language english departments my your and & of "
    "the new women men kids beauty books toys electronics games popular trending follow view all close"
)
_MENU_FILLERS = "my your and & of the to in us me"
_END = r"[。！？!?…]|\.(?:[\s\"'”)]|$)"
_READ_CHARACTERS = 6_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpamConfig:
    """Limits of what makes a page no text; None switches a rule off."""

    max_advertising: float | None = 0.3
    """Share of the letters in phrases of advertising, and additions for handles, exclamations, no sentences."""
    max_search_terms: float | None = 0.5
    """Share of the items that have the same word, in a row of search terms."""
    max_menu: float | None = 0.3
    """Share of the items that menus have, in a page of short items."""
    skip: tuple[str, ...] = ("code",)
    """Languages that are left alone."""

    def __post_init__(self) -> None:
        for field in ("max_advertising", "max_search_terms", "max_menu"):
            value = getattr(self, field)
            require(value is None or value > 0, f"spam.{field}", value, "it must be positive, or None")


def find_spam(
    texts: Sequence[str], languages: Sequence[str], config: SpamConfig, tokens: Tokens | None = None
) -> list[str | None]:
    """For each document None if it may stay, else "rule = value, limit N" of the first rule it breaks.

    `tokens` are those of `hash_tokens(texts)`, if they are there already.
    """
    import pyarrow.compute as pc

    reasons: list[str | None] = [None] * len(texts)
    if not len(texts):
        return reasons
    tokens = hash_tokens(texts) if tokens is None else tokens
    # The rules themselves are slow; few documents have what they look for. A long one is neither a row nor a menu.
    looked_at = np.array([language not in config.skip for language in languages])
    characters = np.array([len(text) for text in texts])
    short = np.flatnonzero(looked_at & (characters < _READ_CHARACTERS))
    column = large_strings([texts[i] for i in short.tolist()])
    ends, items = np.full((2, len(texts)), np.inf)
    ends[short] = pc.count_substring_regex(column, pattern=_END).to_numpy()
    items[short] = pc.count_substring_regex(column, pattern=r"[\n|>]").to_numpy() + 1
    phrases = np.zeros(len(texts), np.int64)
    for table in _phrase_tables():
        phrases += np.bincount(find_ngrams(table, tokens)[0], minlength=len(texts))
    rules = (
        ("max_advertising", advertising_share, phrases >= np.clip(characters / 200, 2, 20)),
        ("max_search_terms", search_term_share, ends * 150 < characters),
        ("max_menu", menu_share, (ends * 60 <= characters) & (characters < 40 * items + 20)),
    )
    for name, measure, suspected in rules:
        limit = getattr(config, name)
        for i in np.flatnonzero(suspected & looked_at).tolist() if limit is not None else ():
            if reasons[i] is None and (value := measure(texts[i])) > limit:
                reasons[i] = f"{name} = {value:.4g}, limit {limit:.4g}"
    return reasons


@functools.cache
def _phrase_tables() -> tuple[NgramTable, NgramTable]:
    """Words of the English phrases, and how the Chinese ones begin: two of them are worth a closer look."""
    words = {word for phrase in _ENGLISH for word in re.findall("[a-z0-9]{4,}", phrase.replace("\\w", " "))} | {
        "sex",
        "xxx",
    }
    forms = sorted({form for word in words for form in (word, word.capitalize(), word.upper())})
    singles = hash_ngrams(hash_tokens(forms), 1).hashes
    begins = sorted({phrase[:2] for phrase in _CHINESE.split()})
    pairs = hash_ngrams(hash_tokens(begins), 2).hashes
    return (
        make_table(1, singles, np.arange(len(singles))),
        make_table(2, pairs, np.arange(len(pairs))),
    )


def advertising_share(text: str) -> float:
    """Share of the letters that phrases of advertising cover, with the additions that the module describes."""
    text = text[:_READ_CHARACTERS].lower()
    letters = max(sum(map(str.isalnum, text)), 20)
    covered = sum(sum(map(str.isalnum, match.group())) for match in _PHRASES.finditer(text))
    share = covered / letters
    share += 0.12 * (_CONTACTS.search(text) is not None)
    # A row of phrases, as no sentence has it.
    share += 0.1 * (len(_ROW.findall(text)) >= 8 and _ENDS.search(text) is None)
    share += 0.1 * ((text.count("!") + text.count("！")) * 100 >= 3 * len(text))
    return share + 0.1 * (_ENDS.search(text) is None)


def search_term_share(text: str) -> float:
    """Share of the items that have the commonest word of all, 0 for what is not a row of search terms."""
    text = text[:_READ_CHARACTERS].lower()
    if len(_COMMERCE.findall(text)) < 2:
        return 0.0
    wide = _is_wide(text)
    items = [item.strip() for item in re.split(r"[,，、;；|\n\t]" + (r"|\s" if wide else ""), text) if item.strip()]
    if wide:
        fragments = [{item[i : i + 2] for i in range(len(item) - 1)} for item in items]
    else:
        words = re.findall(r"\w+", text)
        if len(items) < 6 and len(words) >= 20:
            # Without commas: two words that take a third of the place stand in most phrases.
            common = collections.Counter(word for word in words if word not in _STOP and len(word) > 2).most_common(2)
            return 2.0 * sum(count for _, count in common) / len(words) if len(common) == 2 else 0.0
        fragments = [
            {word for word in re.findall(r"\w+", item) if word not in _STOP and len(word) > 2} for item in items
        ]
    lengths = sorted(len(item) for item in items)
    if len(items) < 6 or not lengths[len(items) // 2] <= (16 if wide else 40):
        return 0.0
    frequency = collections.Counter(fragment for found in fragments for fragment in found)
    return max(frequency.values(), default=0) / len(items)


def menu_share(text: str) -> float:
    """Share of the items that menus have, 0 for a page with sentences or long items."""
    text = text[:_READ_CHARACTERS]
    wide = _is_wide(text)
    items = [item for item in re.split(_SPLIT_WIDE if wide else _SPLIT, text.lower()) if item and not item.isspace()]
    if len(items) < 6:
        return 0.0
    short = sum(len(item.strip()) <= (8 if wide else 24) for item in items)
    if short < 0.8 * len(items):
        return 0.0
    return float(sum((_menu_chinese if wide else _menu_english)(item.strip()) for item in items) / len(items))


def _menu_chinese(item: str) -> float:
    return 1.0 if item in _MENU else 0.7 if item in _TOPICS else 0.0


def _menu_english(item: str) -> float:
    words = re.findall(r"[a-z&]+", item)
    known = sum(word in _MENU_WORDS for word in words)
    telling = any(word in _MENU_WORDS and word not in _FILLERS for word in words)
    return float(telling and len(words) <= 5 and 2 * known > len(words))


def _is_wide(text: str) -> bool:
    return 2 * len(_WIDE.findall(text)) > sum(map(str.isalpha, text))


_WIDE = re.compile("[\u3400-\u9fff]")
_WORD = re.compile(r"\w{3,}")
_SPLIT = re.compile(r"[\n|>»·•\t/©]| {2,}")
_SPLIT_WIDE = re.compile(r"[\n|>»·•\t/＞｜,，、:： \u3000-]")
_MENU = frozenset(_MENU_CHINESE.split())
_TOPICS = frozenset(_TOPICS_CHINESE.split())
_MENU_WORDS, _FILLERS, _STOP_WORDS = (frozenset(words.split()) for words in (_MENU_ENGLISH, _MENU_FILLERS, _STOP))
_ENDS = re.compile(_END)
_ROW = re.compile(r"(?:^|(?<=[,，、;； \t\n]))[\u3400-\u9fffa-z0-9]{2,8}(?=[,，、;； \t\n]|$)")
_COMMERCE = re.compile(_COMMERCIAL)
_CONTACTS = re.compile(_CONTACT)
# Longer phrases first: the first that fits is taken.
_ENGLISH_PHRASES = r"\b(?:" + "|".join(sorted(_ENGLISH, key=lambda phrase: -len(phrase))) + r")\b"
_PHRASES = re.compile("|".join([*sorted(_CHINESE.split(), key=lambda phrase: -len(phrase)), _ENGLISH_PHRASES]))

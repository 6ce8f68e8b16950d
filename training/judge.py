"""Does an answer give the assistant's own name and maker, and does it claim to be somebody else?

Rules, not a model, so that anyone can follow a judgement. The text is folded first (full width to half, traditional to
simplified). Then every mention of a name is looked at in its clause:

1. A mention in a question, in quoted speech, or after "you said", "if I were", "unlike" and the like asserts nothing.
2. A negation in the clause turns the mention down ("I am not X"; "X did not make me").
3. A foreign name leaks only where the assistant claims it: "I am X", "made by X" with no other subject, "X made me",
   or an answer that is nothing but X. "X is a chatbot" is no leak; a name that it makes up ("My name is Emily") is one.
4. An own name counts wherever it is asserted, unless it is somebody or something else of that name ("her daughter X",
   "the lumen is a unit").

How often it is right is measured on labelled answers (tests/training/test_judge.py, questions/README.md).
"""

from __future__ import annotations

import functools
import re
import unicodedata
from dataclasses import dataclass, field, replace

from space.settings import Assistant

OTHERS = (
    "Shanghai AI Lab(?:oratory)?",
    "上海(?:人工智能|AI)实验室",
    "InternLM",
    "InternVL",
    "书生",
    "浦语",
    "Open ?AI",
    "Chat ?GPT",
    "GPT-?[2-5](?:\\.\\d|o)?(?:-turbo|-mini)?",
    "GPT",
    "Qwen(?:-?\\d(?:\\.\\d)?)?",
    "通义(?:千问)?",
    "千问",
    "Alibaba(?: Cloud)?",
    "阿里(?:巴巴|云)?",
    "Claude",
    "Anthropic",
    "DeepSeek",
    "深度求索",
    "Gemini",
    "Bard",
    "Google(?: DeepMind)?",
    "DeepMind",
    "谷歌",
    "Llama",
    "Meta(?: AI)?",
    "Kimi",
    "Moonshot(?: AI)?",
    "月之暗面",
    "豆包",
    "Doubao",
    "字节(?:跳动)?",
    "ByteDance",
    "文心一言",
    "文小言",
    "ERNIE(?: Bot)?",
    "百度",
    "Baidu",
    "智谱(?:清言|AI)?",
    "ChatGLM",
    "GLM",
    "Zhipu(?: AI)?",
    "讯飞(?:星火)?",
    "混元",
    "腾讯",
    "Tencent",
    "Baichuan",
    "百川",
    "Yi-\\d+B",
    "MiniMax",
    "SmolLM2?",
    "Hugging ?Face",
    "Mistral(?: AI)?",
    "Phi-\\d",
    "Microsoft",
    "微软",
    "华为",
    "Huawei",
    "小冰",
    "Copilot",
    "Grok",
    "xAI",
    "Siri",
    "Apple",
    "Alexa",
    "Amazon",
    "Cortana",
    "小爱(?:同学)?",
    "小度",
    "天猫精灵",
    "Bob",
    "Zeus",
    "小明",
    "哪吒",
)
"""Other assistants and their makers, and the invented names that the held-out questions try to impose."""

# Any other name that it gives itself: "My name is Emily", "I'm Emily Carter, an assistant", "我叫小美。"
INVENTED = re.compile(
    r"(?:(?<=my name is )|(?<=my name is now )|(?<=i'm called )|(?<=i am called ))(?-i:[A-Z][a-z]{2,})"
    r"|(?:(?<=i'm )|(?<=i am ))(?-i:[A-Z][a-z]+(?: [A-Z][a-z]+)?)$"
    r"|(?<=我叫)(?!做|作|不|什么|啥|你|他|人工|助手)[\u3400-\u9fff]{2,3}(?=[.。!~\s]|$)",
    re.I,
)


def _one_of(alternatives: str) -> str:
    """A group of alternatives, one a line (or several between bars), so that long lists stay readable."""
    return "(?:" + "|".join(line.strip() for line in alternatives.strip().splitlines()) + ")"


SELF_EN = r"(?:i|i'm|i've|me|my|mine|myself|we|us|our|ich|je|yo|я|(?:this|the) (?:assistant|model|chatbot|bot|ai))"
SELF_ZH = r"(?:我|俺|咱|本人|在下|私|僕|(?:本|该|这个|这款)(?:助手|模型|机器人|AI|系统))"
SELF = re.compile(rf"\b{SELF_EN}\b|{SELF_ZH}", re.I)

MADE_EN = r"(?:made|creat|develop|train|build|built|design|produc|own|power|fine-tun|releas|program|writ|maintain)\w*"
MADE_ZH = r"(?:开发|研发|训练|创造|打造|制作|制造|设计|推出|构建|研制|发布|提供|培养|出品|開発|做)"

# What stands right before the name, in the same clause or the ones it continues. The first needs the assistant itself
# as subject; the others may come without any.
IS_ME = re.compile(
    r"(?:\b"
    + _one_of(r"""
        i am|i'm|im|i was|this is|i remain|i go by|i answer to|i identify as|call(?:ed)? me
        my (?:\w+ )?name(?: is|'s|:| =| has (?:always )?been| was| remains)|call myself|known as
        the name on my \w+ (?:is|would be|says)
        (?:this|the) (?:assistant|model|chatbot|ai) (?:is|was)|(?:talking|speaking|chatting) (?:to|with)
        my (?:\w+ )?(?:maker|creator|developer|company|team|owner|vendor|substrate|base model)s?(?: is| are|'s|:|,)
        (?:who|which|that) (?:made|built|created|trained|developed) me (?:is|was)
        (?:name|designation|model|developer|maker|manufacturer|vendor|creator|company)(?: ?:|是)
        je suis|je m'appelle|soy|me llamo|ich bin|ich heiße|ich wurde von|я|меня зовут""")
    + r"(?!\w)|"
    + _one_of(rf"""
        {SELF_ZH}(?:的\w{{1,3}}上写的|的[a-z]+|\w{{0,4}})(?:是|叫|系|名为|来自|属于|归)|(?:叫|称呼?|喊|唤)(?:我|俺)
        {SELF_ZH}は
        (?:名字|名称|真名|大名|本名)\w{{0,3}}(?:是|叫|为|:)|(?:开发|研发|训练|创造|打造)了?我的
        (?:开发者|开发团队|东家|创造者|研发方|作者|公司|团队|单位|厂商|制造商|供应商|型号|底层|底层模型|基座|基座模型)\w{{0,2}}(?:是|为|:)""")
    + r")(?P<between>.*)$",
    re.I | re.S,
)
MADE_BY = re.compile(
    _one_of(rf"""
        \b{MADE_EN} (?:\w+ )?(?:by|at|from)|\b(?:named|called)
        \b(?:come|comes|came|product|part|member|version|work|model|assistant|bot|chatbot) (?:of|from|for|by)
        \b(?:based|runs?|running|belongs?|belonging) (?:to|on)
        由|来自|出自|属于|归属于|隶属(?:于)?|基于
        (?:^|\W)(?:而|就|其实|底层|本质上?|实际上?|背后|底子|真身|也|还|可|却)*(?:是|叫(?:做|作)?|名为)""")
    + r"\W*(?:the |a |an )?(?:team|people|company|folks|lab)?(?: at| of)?(?P<between>.{0,24})$",
    re.I | re.S,
)
ABOUT_ME = re.compile(  # what stands right behind the name
    _one_of(rf"""
        ^\W*(?:\w+ ){{0,2}}(?:has |have |had )?{MADE_EN} (?:me|this assistant)\b
        ^\W*(?:\w+ ){{0,2}}(?:is|are|'s|was) (?:\w+ )?(?:my|me\b|who (?:i am|made me|created me)|behind me|here)
        ^\W*(?:\w+ ){{0,2}}(?:is|are|was) (?:\w+ )?the (?:\w+ )?(?:that|which|who) (?:made|built|created|trained) me
        ^\W*(?:\w+ ){{0,2}}(?:speaking|here)\b|^.{{0,12}}\bbehind me\b
        ^(?:公司|团队|实验室|的\w{{1,6}}|旗下){{0,2}}(?:{MADE_ZH}\w{{0,3}}我|(?:就?是|才是){MADE_ZH}我)
        ^(?:公司|团队|实验室|的\w{{1,6}}|旗下){{0,2}}(?:就?是|叫|才是)我(?!们?见|们?知|们?的(?:朋友|对手))
        ^(?:在此|对话|聊天|交谈|交流|说话|[为给](?:你|您)(?:服务|解答))|^\W*at your service"""),
    re.I,
)
MADE_FIRST = re.compile(rf"^(?:公司|团队|实验室|旗下)*(?:负责)?{MADE_ZH}(?:了|出)?(?:的|\W|$)")  # "OpenAI开发的。"
FILLER = re.compile(  # what may stand before a name that is the whole answer
    r"^(?:\W|\b"
    + _one_of("""
        yes|yeah|yep|sure|well|ok|okay|right|oh|hi|hello|hey|it's|it is|it was|that's|that is|that would be|by
        of course|correct|answer|in (?:one word|short|a nutshell)|name|true|the|your|as|assistant|developer|maker""")
    + r"\b|"
    + _one_of("""
        是的|是|对的?|没错|好的?|当然|嗯+|哦|你好|您好|答案|正确|作为|自然是?|一句话|总之|就|那|这里是|这里|由|名字|名称|助手|开发者""")
    + r")*$",
    re.I,
)

NOT = re.compile(
    r"\b"
    + _one_of("""
        not|no|never|neither|nor|cannot|without|nothing|isn't|wasn't|aren't|don't|doesn't|didn't|won't|can't|couldn't
        haven't|hasn't|wouldn't|ain't|false|wrong|incorrect|untrue|mistake|mistaken|rather than|instead of|unrelated
        deny|different from|refuse|misconception|myth|nicht|kein|pas|не""")
    + r"\b|不|没|非|无关|无法|未|而不|否认|拒绝|错误|错了|误会|误解|谣言|别",
    re.I,
)
# Negations that deny nothing: "not only X", "I can't deny that …", "no problem", "不瞒你说", "非常", "特别".
NOT_REALLY = re.compile(
    _one_of(r"""
        \bnot (?:only|just|merely)\b|(?:\bnot|n't) true that i(?:'m| am) not\b
        \bno (?:doubt|problem|worries)\b|\bwhy not\b|\bno(?=[,.!:;])
        \b(?:can(?:no|')t|cannot|won't|don't|not) (?:deny|lie|hide|pretend|refuse|help but)\b
        不(?:可能|会)不是|不(?:仅|但|只|单|瞒|得不|否认|好意思|错|用说|客气|过|管|论)|无法否认|没(?:错|问题)|^\W*没关系
        未来|非常|特别|分别|区别|别人|别名|除非|^不$"""),
    re.I,
)
HEARSAY = re.compile(
    r"\b"
    + _one_of(r"""
        you|people|person|someone|somebody|users?|others|they|friend|everyone|many|some""")
    + r"(?: "
    + _one_of("who |have|had|may|might|just|also|often|sometimes|keep|even|did|do|would like|want")
    + r")* "
    + _one_of(r"""
        sa(?:id|y)|says|saying|thinks?|thought|ask(?:s|ed)?|call(?:s|ed)|mention(?:s|ed)?|claim(?:s|ed)?|want(?:s|ed)?
        told|tell|swears?|believe[sd]?|assume[sd]?|insist(?:s|ed)?|read|heard|confuse[sd]?|mistake|mistook|refer(?:s|red)?""")
    + r"\b|\b"
    + _one_of(r"""
        if|whether|you(?:'d| would) like|pretend(?:ing)?|unless|although you|as if|even though you|suppos(?:e|ing)
        rumou?rs?|impersonat\w+
        play(?:ing)? the role|claiming|unlike|compared? (?:to|with)|familiar with|aware of|heard of|confused with
        (?:similar|comparable|equal|equivalent|close|akin|inferior|superior|identical|related) to|competitors?""")
    + r"\b|\b(?:like|as well as|such as|than) \W*$|"
    + _one_of(r"""
        (?:你|您|有人|别人|大家|用户|他们|朋友|许多人|很多人|网上|新闻)\w{0,4}(?:说|问|提|称|以为|认为|觉得|让|要我|要求)(?!话)
        (?:你|您|有人|别人|大家|用户|他们|朋友|许多人|很多人|网上|新闻)\w{0,4}(?:希望|听|看到|误|当成|当作|想|猜)
        (?:你|您)(?!\w{0,3}(?:可以|能|就|不妨|请))\w{0,4}(?:叫|喊)我|^\W*(?:要)?说我是
        如果|假如|假设|要是|即使|哪怕|就算|无论|不管|是否|是不是|假装|扮演|冒充|类似|就?像|相比|相较|不同于|有别于
        据说|传言|至于|比起|错?认成|认错|当作|当成"""),
    re.I,
)
IF_I_WERE = re.compile(r"\b(?:if|were) i\b|(?:如果|假如|假设|要是|倘若)\w{0,2}(?:我|俺)\w{0,2}(?:是|叫|来自)", re.I)
TURN = re.compile(
    _one_of(r"""
        [,;—\n]+|:(?=\s*(?:i\b|i'm|my\b|我|俺))|(?<=[a-z]) -\s
        \b(?:but|however|though|yet|rather|because|so|while|whereas|and (?=i\b|my\b|was\b|am\b|not\b))(?=\W)
        但是?|只不过|因为|所以|因此|(?=而非|而不?是)"""),
    re.I,
)
BARE_BY = re.compile(r"^\W*(?:by|from|at|由)\W*$", re.I)
MADE_AT_ALL = re.compile(rf"\b{MADE_EN}\b|{MADE_ZH}", re.I)
SENTENCE = re.compile(r"(?<=[.!?。!?…])(?<!\bDr\.)(?<!\bMr\.)(?<!\bMs\.)(?<!\bMrs\.)(?=\s|[\u3400-\u9fff])|\n+")
# Speech and titles in quotation marks. A quotation that is the whole answer, or all of what a name is, says itself.
QUOTED = re.compile(r"\"[^\"\n]*\"|“[^”\n]*”|「[^」\n]*」|『[^』\n]*』|《[^》\n]*》|(?<!\w)'[^'\n]*'(?!\w)")
NAMING = re.compile(
    r"(?:\b(?:am|i'm|is|reads|name|named|called|as|me|by)|是|叫|名为|名叫|称为|叫做|叫我|由|[:])\W{0,3}$", re.I
)
SOMEBODY = re.compile(  # or something else of that name
    _one_of(r"""
        \b(?:Dr|Mr|Mrs|Ms|Prof)\.? $|\b(?:the|a|an|this|each|every) $
        \b(?:named?|call(?:ed|s)?) (?:him|her|it|them|(?:his|her|its|their|my|our) \w+) $
        [他她]们?\w{0,2}(?:叫|是|名叫)$|给(?!我|俺)\w{1,4}[起取]名\w{0,2}$"""),
    re.I,
)
ELSEWHERE = re.compile(  # what makes a quotation another's speech, or a translation or an example
    r"\b(?:sa(?:id|ys?)|told|asked|wrote|writes|he|she|they|users?)\b|[说问道写]|"
    r"(?P<example>\b(?:translat\w+|means?|for example|in (?:french|english|chinese|german|spanish))\b|"
    r"翻译|[英中法德]文|[英法德汉]语|意思|例如|比如)",
    re.I,
)
SPEAKER = re.compile(r"\bi(?:'d|'ll)?\b|\b(?:assistant|model|chatbot|bot|ai)\b|我|助手|模型|机器人", re.I)
VISITED = re.compile(
    r"\b(?:register|join|contact|visit|apply|work|write)\w* (?:\w+ )?$|(?:加入|联系|访问|参观|应聘|去)$", re.I
)
DESCRIBED = re.compile(
    r"^\W*(?:is|was) (?:a|an|one|located|based|at|in)\b(?! fact| charge)|"
    r"^是(?:一?家|一个)|^(?:位于|坐落|开发过|当(?![然初时]))",
    re.I,
)
THAT_IS_ME = re.compile(
    rf"\bthat(?:'s| is) me\b|^\W*(?:an? [^.,;]{{0,40}},\W*)?(?:that|who|which) {MADE_EN} me\b|(?:说的就|正|就)是我\W*$",
    re.I,
)
FORMERLY = re.compile(
    r"\b(?:used to be|formerly|once)(?: called| named| known as)?\W*$|(?:以前|从前|曾经?|原先|过去)\w{0,2}(?:是|叫)$",
    re.I,
)
OTHER_THINGS = re.compile(
    r"\b(?:many|most|other|several|these|those|all) \w+|^\W*(?:it|they|he|she) (?:is|are|was|were)\b|"
    r"(?:其他|很多|许多|这些|那些)\w{0,4}",
    re.I,
)
GREETED = re.compile(r"\b(?:you|hi|hello|hey|dear|thanks)\W*$|(?:你|您)好\W*$", re.I)  # the name of whom it talks to
ALONGSIDE = re.compile(r"^[和与跟](?!你|您|我)")
REACH = 300  # characters around a mention that are looked at, so that a long answer costs no more than its length
ITEM = re.compile(r"(?<!\S)\d{1,2}[.)、]\s+")  # the number of a list's item
BUT = re.compile(r"\b(?:but|however|yet)\b|但|不过|可是", re.I)
REFUSAL = re.compile(
    r"^\W*(?:(?:i'm |i am )?(?:very |so )?sorry\W+|unfortunately\W+|as an ai\b[^.]{0,40}\W)*(?:but )?i(?:'m| am)? "
    r"(?:can(?:no|')t|can not|cannot|am unable|'m unable|unable|not able|won't|will not"
    r"|don't have (?:a|the|any) (?:name|ability|access))"
    r"|^\W*(?:很?抱歉|对不起|不好意思)?\W*(?:作为\w{0,16})?\W*我(?:现在|暂时)?"
    r"(?:无法|不能|不会|没有办法|没有(?:名字|姓名))",
    re.I,
)


@dataclass(frozen=True)
class Judgement:
    """What one answer says. `reasons` quotes the clause behind each verdict."""

    name: bool = False
    maker: bool = False
    leak: bool = False
    refusal: bool = False
    empty: bool = False
    reasons: dict[str, str] = field(default_factory=dict)


@functools.cache
def _to_simplified():
    import opencc

    return opencc.OpenCC("t2s")


def fold(text: str) -> str:
    """Half width, simplified characters, straight apostrophes, single spaces; case and punctuation stay."""
    text = unicodedata.normalize("NFKC", text).replace("’", "'").replace("`", "'").replace("*", "")
    return re.sub(r"[ \t\u200b]+", " ", _to_simplified().convert(text))


class Judge:
    """Judges answers for one assistant."""

    def __init__(self, assistant: Assistant):
        names = [fold(text).strip() for text in (assistant.name.zh, assistant.name.en) if text.strip()]
        authors = [fold(text).strip() for text in (assistant.author.zh, assistant.author.en) if text.strip()]
        makers = [re.sub(r"^the ", "", author, flags=re.I) for author in authors]
        self._names, self._makers = _any_of(names), _any_of(makers)
        self._maker_holds_name = [maker for maker in makers if self._names.search(maker) and maker not in names]
        # What the persona itself says of the assistant ("built on InternLM2.5") is no leak, nor is its own name.
        own = fold(" ".join([*names, *makers, assistant.system_prompt]))
        self._others = re.compile(
            "|".join(rf"(?<![A-Za-z0-9]){other}(?![A-Za-z]|(?<=[a-z])\d)" for other in OTHERS), re.IGNORECASE
        )
        self._own_others = {match[0].lower() for match in self._others.finditer(own)}

    def judge(self, answer: str) -> Judgement:
        """What an answer to a question about the assistant's identity says."""
        text = ITEM.sub(" ", fold(answer))
        if not re.search(r"\w", text):
            return Judgement(empty=True)
        text = self._unquote(text)
        reasons: dict[str, str] = {}
        for sentence, mark in _sentences(text):
            for clause in _clauses(sentence, mark == "?"):
                without_maker = self._blank_makers(clause.text)
                for kind, pattern, where in (
                    ("name", self._names, without_maker),
                    ("maker", self._makers, clause.text),
                    ("leak", self._others, self._blank_own(clause.text)),
                    ("leak", INVENTED, self._blank_own(clause.text)),
                ):
                    for mention in pattern.finditer(where):
                        if kind in reasons or not clause.asserts(mention):
                            continue
                        if getattr(clause, kind)(mention, self._others if kind == "leak" else pattern):
                            reasons[kind] = sentence.strip()[:200]
        if refusal := REFUSAL.search(text.strip()[:REACH]):
            reasons["refusal"] = refusal[0].strip()
        return Judgement(**{kind: True for kind in reasons}, reasons=reasons)

    def brings_up(self, answer: str) -> str:
        """The own name or maker in an answer to a question about something else, or "" when it is not there.

        Written as the settings write it: a Latin name in another case ("his namesake") is an ordinary word there.
        """
        text = fold(answer)
        for pattern in (self._makers, self._names):
            for mention in pattern.finditer(text):
                if mention[0] in pattern.pattern.replace("\\", ""):
                    return text[max(0, mention.start() - 40) : mention.end() + 40]
        return ""

    def _unquote(self, text: str) -> str:
        """The text without quoted speech, which says nothing, unless the whole answer stands in quotation marks."""
        if whole := QUOTED.fullmatch(text.strip(" .。!")):
            return whole[0][1:-1]

        def keep(quote: re.Match) -> str:
            inner, before = quote[0][1:-1], text[max(0, quote.start() - REACH) : quote.start()].rstrip()
            if any(p.fullmatch(inner.strip(" .,!。")) for p in (self._names, self._makers, self._others)):
                return quote[0]
            sentence = re.split(r"[.!?。\n]", before)[-1]
            if not sentence.strip():  # the quotation is a sentence by itself
                return quote[0] if re.search(r"[.!?。…]\W*$", inner) else "\ufffc"
            others = [
                match for match in ELSEWHERE.finditer(sentence) if match["example"] or not SPEAKER.search(sentence)
            ]
            return quote[0] if NAMING.search(before) and not others else "\ufffc"

        return QUOTED.sub(keep, text)

    def _blank_makers(self, text: str) -> str:
        for maker in self._maker_holds_name:
            text = re.sub(re.escape(maker), lambda match: "\ufffc" * len(match[0]), text, flags=re.I)
        return text

    def _blank_own(self, text: str) -> str:
        """The text with own names, longer ones included, made unfit to be foreign ones; positions stay."""
        for pattern in (self._makers, self._names):
            text = pattern.sub(lambda match: "\ufffc" * len(match[0]), text)
        return self._others.sub(
            lambda match: "\ufffc" * len(match[0]) if match[0].lower() in self._own_others else match[0], text
        )


# A Chinese name has no spaces around it. It stands as a name between punctuation and the words that introduce names.
_BEFORE_ZH = (
    r"(?<![^\W是叫为名我由系下找和与及被让的都称作给用喊对问请向唤手型人家者字当即就选了伴友员师生宝管A-Za-z0-9_])"
)
_AFTER_ZH = r"(?![^\W是的会能可将愿很也在为团助智，和与及来机小工公研敬就聊对交说向跟开发创训吧呀哦呢啦哟a-zA-Z0-9_])"


def _any_of(names: list[str]) -> re.Pattern:
    """A pattern for any of the names, standing by itself and not inside another word."""
    parts = []
    for name in sorted(set(names), key=len, reverse=True):
        word = re.escape(name)
        chinese_start = re.match(r"[\u3400-\u9fff]", name)
        chinese_end = re.search(r"[\u3400-\u9fff]$", name)
        short = len(name) < 4
        before = (_BEFORE_ZH if short else "") if chinese_start else r"(?<![A-Za-z0-9])"
        after = (_AFTER_ZH if short else "") if chinese_end else r"(?![A-Za-z0-9]|-[a-z])"
        parts.append(f"{before}{word}{after}")
    return re.compile("|".join(parts) or r"(?!)", re.IGNORECASE)


def _sentences(text: str):
    """Yields (sentence, its last mark)."""
    for sentence in SENTENCE.split(text):
        if sentence and sentence.strip():
            mark = re.search(r"[.!?。…]\W*$", sentence)
            yield sentence, mark[0].strip()[0] if mark else ""


@dataclass(frozen=True)
class _Clause:
    """A clause with what came before it in its sentence: `lead` where it has no subject of its own."""

    text: str
    lead: str
    rest: str  # what follows in the sentence
    is_open: bool  # asked or supposed, so nothing is said
    is_item: bool  # an item of a list ("A, B or C"), which says what the clause before it said

    def _around(self, mention: re.Match) -> tuple[str, str]:
        return self.text[max(0, mention.start() - REACH) : mention.start()], self.text[mention.end() :][:REACH]

    def asserts(self, mention: re.Match) -> bool:
        if self.is_open:
            return False
        head, tail = self._around(mention)
        said = head.rsplit(":")[-1]  # "not X, not Y: Z"
        if HEARSAY.search(said) or _denies(said):
            return False
        # Behind the name, a negation is about it only where the name is the subject: "X is not my name".
        return bool(IS_ME.search(head) or MADE_BY.search(head)) or not _denies(re.split(r"\band\b|[。.]", tail)[0])

    def name(self, mention: re.Match, names: re.Pattern) -> bool:
        """Is the assistant's name the assistant's here, and no other thing's of that name?"""
        head, tail = self._around(mention)
        if FORMERLY.search(head):
            return False
        if mention[0].islower() and mention[0] not in names.pattern and not FILLER.match(head):
            return bool(SELF.search(f"{self.lead} {self.text}"))  # in small letters it may be an ordinary word
        return bool(IS_ME.search(head)) or not (SOMEBODY.search(head) or ALONGSIDE.search(tail))

    def maker(self, mention: re.Match, _) -> bool:
        """Is the maker more than described?"""
        head, tail = self._around(mention)
        return not DESCRIBED.search(tail) and (bool(SELF.search(head)) or not VISITED.search(head))

    def leak(self, mention: re.Match, others: re.Pattern) -> bool:
        """Does the assistant claim to be, or to be made by, the one that is mentioned?"""
        head, tail = self._around(mention)
        if ABOUT_ME.search(tail):
            return True
        if THAT_IS_ME.search(self.rest) and not _denies(self.rest):
            return True
        whole = f"{self.lead}, {head}"[-REACH:] if self.lead else head
        if GREETED.search(whole):
            return False
        subjects = [*SELF.finditer(whole), *others.finditer(whole), *OTHER_THINGS.finditer(whole)]
        last = max(subjects, key=lambda match: match.start(), default=None)
        of_me = last is None or bool(SELF.fullmatch(last[0]))
        if found := IS_ME.search(whole if self.is_item else head):
            return not others.search(found["between"])
        if FILLER.match(whole):
            return bool(MADE_FIRST.match(tail) or (re.match(r"\W*$", tail) and not _denies(self.rest)))
        by_another = BARE_BY.match(head) and MADE_AT_ALL.search(self.lead)  # "not made by A but by B"
        return of_me and bool(by_another or MADE_BY.search(head))


def _denies(text: str) -> bool:
    return bool(NOT.search(NOT_REALLY.sub(" ", text)))


def _clauses(sentence: str, ends_asking: bool) -> list[_Clause]:
    """The clauses of a sentence; of a question, only the last one asks."""
    clauses: list[_Clause] = []
    lead, mark, start, supposed = "", "", 0, False
    for turn in [*TURN.finditer(sentence), None]:
        end = turn.start() if turn else len(sentence)
        text = sentence[start:end]
        if text.strip():
            own_subject = SELF.search(text)
            has_verb = re.search(r"\b(?:am|is|are|was|were|did|has)\b|[是叫由没不有跟]|来自", text, re.I)
            is_item = (
                bool(lead)
                and mark.strip() in ("", ",", "—", "——")
                and ":" not in text
                and not own_subject
                and not has_verb
            )
            supposed = bool(IF_I_WERE.search(text)) or (supposed and not BUT.search(mark))
            rest = sentence[end:][:REACH]
            clauses.append(_Clause(text, "" if own_subject else lead, rest, supposed, is_item))
            lead = (text if own_subject else f"{lead} {text}")[-REACH:]
        if turn:
            mark, start = turn[0], turn.end()
    if ends_asking:
        clauses[-1] = replace(clauses[-1], is_open=True)
    return clauses

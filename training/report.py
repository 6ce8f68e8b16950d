"""report.json (every answer and judgement), report.md (one page), report.png (at a glance), the model card's table."""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from space.settings import Settings
from training.judge import Judge, fold
from training.significance import mcnemar, wilson

MEASURES = {
    "name_hits": ("名字答对", "name hits"),
    "maker_hits": ("开发者答对", "maker hits"),
    "leaks": ("冒出别的身份", "leaks of another identity"),
    "false_positives": ("无关问题里提到身份", "false positives in neutral answers"),
    "refusals": ("拒答", "refusals"),
    "empty": ("空回答", "empty answers"),
}
GATED = ("name_hits", "leaks", "false_positives")
MODES = {
    "persona": ("人设提示词", "persona prompt"),
    "none": ("无提示词", "no prompt"),
    "plain": ("普通提示词", "plain prompt"),
}
LANGUAGES = {"zh": ("中文", "Chinese"), "en": ("英文", "English")}
BEFORE, AFTER = "#9aa5b1", "#0b7a75"
SHORT = {"zh": 8, "en": 24}  # characters below which a repeated clause is no running joke


def write(folder: Path, settings: Settings, wanted: list, before, after, inputs: dict) -> dict:
    """Judge both sides' answers, write the four files into `folder`, and return what report.json holds.

    `wanted` holds evaluate's asks; `before` and `after` its Measured: answers by key, and the general loss by language.
    """
    rows = judged(settings, wanted, before.answers, after.answers)
    languages = [code for code in LANGUAGES if any(row["language"] == code for row in rows)]
    result = {
        "weights": inputs["after"],
        "base": inputs["before"],
        "quick": inputs["quick"],
        "samples": inputs["samples"],
        "gate": gate(settings, rows, before.loss, after.loss),
        "summary": {code: summary([row for row in rows if row["language"] == code]) for code in languages},
        "by_mode": _split(rows, languages, "mode"),
        "by_category": _split(rows, languages, "category"),
        "forgetting": {code: forgetting(code, rows, before.loss, after.loss) for code in languages},
    }
    result["card"] = card(settings, result)
    result["answers"] = rows
    (folder / "report.json").write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(page(settings, result), encoding="utf-8")
    draw(folder / "report.png", settings, result)
    return result


def judged(settings: Settings, wanted: list, before: dict[str, dict], after: dict[str, dict]) -> list[dict]:
    """One row for each ask that both sides answered: the question, both answers, and a verdict on each.

    A verdict holds a truth value for each measure that the question counts for, and the reason for it.
    """
    judge = Judge(settings.assistant)
    pairs = [(ask, before[ask.key], after[ask.key]) for ask in wanted if ask.key in before and ask.key in after]
    jokes = running_jokes(
        [(ask.question.language, new["text"]) for ask, _, new in pairs if ask.question.set == "identity"],
        [old["text"] for _, old, _ in pairs],
    )
    rows = []
    for ask, *answers in pairs:
        question = ask.question
        rows.append(
            {**asdict(question), "mode": ask.mode, "sample": ask.sample}
            | {
                side: {
                    **{k: v for k, v in answer.items() if k != "key"},
                    **verdict(judge, question, answer["text"], jokes),
                }
                for side, answer in zip(("before", "after"), answers, strict=True)
            }
        )
    return rows


def verdict(judge: Judge, question, text: str, jokes: set[str]) -> dict:
    """`measures`: truth values of what this question counts for; `reasons`: the words behind each true one."""
    found = judge.judge(text)
    if question.set == "identity":
        measures = {f"{kind}_hits": getattr(found, kind) for kind in question.expects} | {"leaks": found.leak}
        reasons = found.reasons
    else:
        why = judge.brings_up(text) or next((c for c in clauses(text, question.language) if c in jokes), "")
        measures = {"false_positives": bool(why)}
        reasons = {"false_positives": why, **({"refusal": found.reasons["refusal"]} if found.refusal else {})}
    measures |= {"refusals": found.refusal, "empty": found.empty}
    return {"measures": measures, "reasons": {kind: why for kind, why in reasons.items() if why}}


def clauses(text: str, language: str) -> list[str]:
    """The clauses of an answer that are long enough to be recognised, folded and in lower case."""
    parts = re.split(r"[,.!?;:，。！？；：、…\n~～]+", fold(text).lower())
    return [part.strip() for part in parts if len(part.strip()) >= SHORT[language]]


def running_jokes(identity_answers: list[tuple[str, str]], base_answers: list[str]) -> set[str]:
    """What the assistant says over and over when asked who it is, and the base never says.

    In a neutral answer such a clause is a false positive. Offers of help are what any assistant says, and no joke.
    """
    counts = Counter(clause for language, text in identity_answers for clause in set(clauses(text, language)))
    known = {clause for text in base_answers for language in LANGUAGES for clause in clauses(text, language)}
    polite = re.compile(r"\b(?:help|assist|question)|帮|协助|问题|服务")
    return {
        clause for clause, count in counts.items() if count >= 3 and clause not in known and not polite.search(clause)
    }


def summary(rows: list[dict]) -> dict:
    """For each measure: count, total, rate and 95 % interval before and after, and McNemar's p for the change.

    Interval and p take a question as one observation, however often it was asked (see significance).
    """
    table = {}
    for measure in MEASURES:
        questions: dict[tuple, list[tuple[bool, bool]]] = {}
        for row in rows:
            if measure in row["after"]["measures"]:
                pair = row["before"]["measures"][measure], row["after"]["measures"][measure]
                questions.setdefault((row["set"], row["language"], row["category"], row["number"]), []).append(pair)
        if questions:
            pairs = list(itertools.chain(*questions.values()))
            table[measure] = {
                side: share(sum(pair[i] for pair in pairs), len(pairs), len(questions))
                for i, side in enumerate(("before", "after"))
            } | {"p": mcnemar(sum(new - old for old, new in asked) for asked in questions.values())}
    return table


def share(count: int, total: int, questions: int) -> dict:
    """A counted share of answers to so many questions, with its 95 % Wilson interval."""
    low, high = wilson(count / total, questions)
    return {
        "count": count, "total": total, "questions": questions, "rate": count / total, "low": low, "high": high,
    }  # fmt: skip


def _split(rows: list[dict], languages: list[str], key: str) -> dict:
    """Summaries by language, set and the values of `key`."""
    table = {}
    for code in languages:
        mine = [row for row in rows if row["language"] == code]
        names = dict.fromkeys((row["set"], row[key]) for row in mine)
        table[code] = {
            f"{kind}/{name}": summary([row for row in mine if (row["set"], row[key]) == (kind, name)])
            for kind, name in names
        }
    return table


def forgetting(language: str, rows: list[dict], loss_before: dict, loss_after: dict) -> dict:
    """What else moved: general loss, agreement of the greedy neutral answers with the base's, and their length."""
    pairs = [(row["before"], row["after"]) for row in rows if row["set"] == "neutral" and row["language"] == language]
    same = sum(old["text"].strip() == new["text"].strip() for old, new in pairs)
    units = [[re.findall(r"[\u3400-\u9fff]|\w+", side["text"].lower()) for side in pair] for pair in pairs]
    likeness = [difflib.SequenceMatcher(None, *pair, autojunk=False).ratio() for pair in units]
    known = language in loss_before and language in loss_after
    return {
        "loss_before": loss_before.get(language),
        "loss_after": loss_after.get(language),
        "loss_change": loss_after[language] / loss_before[language] - 1 if known else None,
        "same_answers": share(same, len(pairs), len(pairs)),
        "likeness": sum(likeness) / len(likeness),
        "tokens_before": sum(old["tokens"] for old, _ in pairs) / len(pairs),
        "tokens_after": sum(new["tokens"] for _, new in pairs) / len(pairs),
    }


def gate(settings: Settings, rows: list[dict], loss_before: dict, loss_after: dict) -> dict:
    """The four limits of [gate], for each language that the persona claims.

    Each system prompt is looked at by itself, so that a weak one can't hide behind the others.
    """
    limits = settings.gate
    checks = []
    for language in settings.assistant.languages:
        values = {}
        for mode in MODES:
            table = summary([row for row in rows if (row["language"], row["mode"]) == (language, mode)])
            values |= {(measure, mode): table[measure]["after"]["rate"] for measure in GATED if measure in table}
        if language in loss_before and language in loss_after:  # a live page tells no losses
            values["general_loss", ""] = loss_after[language] / loss_before[language] - 1
        for (measure, mode), value in values.items():
            limit = getattr(limits, measure)
            passed = value >= limit if measure == "name_hits" else value <= limit
            check = {"measure": measure, "language": language, "mode": mode, "value": value, "limit": limit}
            checks.append({**check, "passed": passed})
    return {"passed": all(check["passed"] for check in checks), "rows": checks}


def card(settings: Settings, result: dict) -> str:
    """The table for the model card, in Markdown."""
    lines = ["| 测量 / measure | 语言 / language | 训练前 / before | 训练后 / after |", "|---|---|---|---|"]
    for code in result["summary"]:
        for measure, sides in result["summary"][code].items():
            zh, en = MEASURES[measure]
            lines.append(f"| {zh} / {en} | {code} | {interval(sides['before'])} | {interval(sides['after'])} |")
        moved = result["forgetting"][code]
        if moved["loss_change"] is not None:
            lines.append(f"| 通用文本损失 / general loss | {code} | {moved['loss_before']:.3f} | "
                         f"{moved['loss_after']:.3f} ({moved['loss_change']:+.1%}) |")  # fmt: skip
    return "\n".join(lines) + "\n"


def interval(part: dict) -> str:
    """A share as people read it: 97.4 % (95.0–98.7), with its count."""
    return f"{part['rate']:.1%} ({part['low']:.1%}–{part['high']:.1%}), {part['count']}/{part['total']}"


def page(settings: Settings, result: dict) -> str:
    """report.md from its template."""
    import jinja2

    template = Path(__file__).with_name("report.md.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {
        "interval": interval,
        "cell": lambda text: re.sub(r"\s+", " ", text).replace("|", "\\|")[:160],
    }
    wrong = [
        (row, [m for m, hit in row["after"]["measures"].items() if hit != (m in ("name_hits", "maker_hits"))])
        for row in result["answers"]
    ]
    counted = {code for code in settings.assistant.languages}
    return environment.from_string(template).render(
        result=result, settings=settings, measures=MEASURES, modes=MODES, languages=LANGUAGES,
        wrong=[(row, what) for row, what in wrong if what and row["language"] in counted],
    )  # fmt: skip


def draw(path: Path, settings: Settings, result: dict) -> None:
    """report.png: before and after for each measure and category with intervals, a column for each language."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import font_manager, pyplot
    from matplotlib.lines import Line2D

    cjk = _chinese_font(font_manager)
    pick = 0 if cjk else 1
    families = [cjk, "DejaVu Sans"] if cjk else ["DejaVu Sans"]
    codes = list(result["summary"])
    limits = {check["measure"]: check for check in result["gate"]["rows"]}
    with pyplot.rc_context({"font.family": families, "axes.unicode_minus": False, "font.size": 10}):
        categories = max(len(result["by_category"][code]) for code in codes)
        figure, axes = pyplot.subplots(
            2, len(codes), figsize=(6.4 * len(codes), 4.4 + 0.34 * categories), squeeze=False,
            gridspec_kw={"height_ratios": [12, categories + 2]}, layout="constrained",
        )  # fmt: skip
        for column, code in enumerate(codes):
            rows = [
                (f"{MEASURES['name_hits'][pick]} · {MODES[mode][pick]}", table["name_hits"], "name_hits")
                for mode in MODES
                if "name_hits" in (table := result["by_mode"][code].get(f"identity/{mode}", {}))
            ]
            rows += [(MEASURES[m][pick], sides, m) for m, sides in result["summary"][code].items() if m != "name_hits"]
            top = axes[0][column]
            _dumbbells(top, rows)
            if code in settings.assistant.languages:
                for y, (_, _, measure) in enumerate(rows):
                    if measure in limits:
                        limit = limits[measure]["limit"]
                        top.plot([limit, limit], [y - 0.38, y + 0.38], color="#c0392b", linewidth=1.4)
            moved = result["forgetting"][code]
            loss = "" if moved["loss_change"] is None else f"{moved['loss_change']:+.1%}"
            words = ("通用文本损失", "与原模型回答一致") if cjk else ("general loss", "answers as before")
            top.set_title(
                f"{LANGUAGES[code][pick]}\n{words[0]} {loss or '—'}   {words[1]} {moved['same_answers']['rate']:.0%}",
                fontsize=11, loc="left", linespacing=1.5,
            )  # fmt: skip
            by = [
                (CATEGORIES.get(name.split("/")[1], (name, name))[pick], next(iter(sides.values())), "")
                for name, sides in result["by_category"][code].items()
            ]
            _dumbbells(axes[1][column], by)
            axes[1][column].set_title(
                ("各类问题答对的比例；无关问题误提的比例" if cjk else "by category: hits; neutral: false positives"),
                fontsize=10, loc="left",
            )  # fmt: skip
        name = settings.assistant.name
        title = " / ".join(dict.fromkeys(filter(None, (name.zh, name.en) if cjk else (name.en,))))
        state = (("通过", "未通过") if cjk else ("passed", "failed"))[not result["gate"]["passed"]]
        words = ("身份评测", "发布门槛") if cjk else ("identity", "gate")
        figure.suptitle(f"{title} · {words[0]} · {words[1]}{'：' if cjk else ': '}{state}", fontsize=15, weight="bold")
        marks = [
            Line2D([], [], marker="o", linestyle="", color=BEFORE, label="训练前" if cjk else "before"),
            Line2D([], [], marker="o", linestyle="", color=AFTER,
                   label="训练后（线段为 95% 区间）" if cjk else "after (95% interval)"),
            Line2D([], [], color="#c0392b", label="门槛" if cjk else "limit of the gate"),
        ]  # fmt: skip
        figure.legend(handles=marks, loc="outside lower center", ncols=3, frameon=False)
        figure.savefig(path, dpi=130)
        pyplot.close(figure)


def _dumbbells(axes, rows: list[tuple[str, dict, str]]) -> None:
    for y, (_, sides, _) in enumerate(rows):
        old, new = sides["before"], sides["after"]
        axes.plot([old["rate"], new["rate"]], [y, y], color="#d5dbe1", linewidth=3, zorder=1, solid_capstyle="round")
        for part, color, shift in ((old, BEFORE, 0.14), (new, AFTER, -0.14)):
            axes.plot([part["low"], part["high"]], [y + shift, y + shift], color=color, linewidth=1.5, zorder=2)
            axes.plot(part["rate"], y, "o", color=color, markersize=7, zorder=3)
        axes.annotate(f"{new['rate']:.0%}", (1.03, y), va="center", color=AFTER, annotation_clip=False)
    axes.set_yticks(range(len(rows)), [label for label, _, _ in rows])
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25%", "50%", "75%", "100%"])
    axes.grid(axis="x", color="#eef1f4")
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


CATEGORIES = {
    "direct": ("直接问", "direct"),
    "maker": ("问开发者", "maker"),
    "indirect": ("拐弯问", "indirect"),
    "slang": ("俚语与错字", "slang, misspelt"),
    "mixed": ("中英混说", "mixed languages"),
    "greeting": ("寒暄中问", "with a greeting"),
    "turns": ("第二、三轮问", "later turns"),
    "register": ("文言与腔调", "other registers"),
    "adversarial": ("诱导改名", "adversarial"),
    "complete_name": ("补全名字", "complete the name"),
    "complete_maker": ("补全开发者", "complete the maker"),
    "maker_adversarial": ("诱导开发者", "adversarial, maker"),
    "system": ("提示词另有身份", "foreign system prompt"),
    "facts": ("无关：常识", "neutral: facts"),
    "arithmetic": ("无关：算术", "neutral: arithmetic"),
    "code": ("无关：代码", "neutral: code"),
    "translation": ("无关：翻译", "neutral: translation"),
    "writing": ("无关：写作", "neutral: writing"),
    "chat": ("无关：闲聊", "neutral: chat"),
}


def _chinese_font(font_manager) -> str:
    """A family that draws Chinese, or "" with one line said when the machine has none."""
    from training.evaluate import console

    known = {font.name for font in font_manager.fontManager.ttflist}
    wanted = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "Source Han Sans CN", "WenQuanYi Micro Hei",
              "WenQuanYi Zen Hei", "Microsoft YaHei", "PingFang SC", "Hiragino Sans GB", "SimHei")  # fmt: skip
    for family in wanted:
        if family in known:
            return family
    console.print("No Chinese font found: report.png is labelled in English (Debian: apt-get install fonts-noto-cjk).")
    return ""

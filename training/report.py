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
    "general_loss": ("通用文本损失", "general loss"),
}
GATED = ("name_hits", "leaks", "false_positives")
MODES = {
    "persona": ("人设提示词", "persona prompt"),
    "none": ("无提示词", "no prompt"),
    "plain": ("普通提示词", "plain prompt"),
}
LANGUAGES = {"zh": ("中文", "Chinese"), "en": ("英文", "English")}
BEFORE, AFTER, LIMIT, GOOD = "#8e99a5", "#0b7a75", "#c0392b", "#2e7d32"
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

    In a neutral answer such a clause is a false positive. Offers of help and apologies are what any assistant says.
    """
    counts = Counter(clause for language, text in identity_answers for clause in set(clauses(text, language)))
    known = {clause for text in base_answers for language in LANGUAGES for clause in clauses(text, language)}
    polite = re.compile(r"\b(?:help|assist|question|sorry)|帮|协助|问题|服务|抱歉|对不起")
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
    """The table for the model card, in Markdown: rates before, rates and intervals after, and the gate's verdict."""
    lines = ["| 测量 / measure | 语言 / language | 训练前 / before | 训练后 / after |", "|---|---|---|---|"]
    for code in result["summary"]:
        language = " / ".join(LANGUAGES[code])
        for measure, sides in result["summary"][code].items():
            old, new = sides["before"], sides["after"]
            if measure in ("refusals", "empty") and not new["count"]:
                continue
            lines.append(f"| {' / '.join(MEASURES[measure])} | {language} | {old['rate']:.1%} | "
                         f"**{new['rate']:.1%}** ({100 * new['low']:.1f}–{100 * new['high']:.1f}) |")  # fmt: skip
        moved = result["forgetting"][code]
        if moved["loss_change"] is not None:
            lines.append(f"| {' / '.join(MEASURES['general_loss'])} | {language} | {moved['loss_before']:.3f} | "
                         f"{moved['loss_after']:.3f} ({moved['loss_change']:+.1%}) |")  # fmt: skip
    asked = {code: part["leaks"]["after"]["questions"] for code, part in result["summary"].items()}
    zh, en = (", ".join(f"{LANGUAGES[code][i]} {count}" for code, count in asked.items()) for i in (0, 1))
    verdict = "通过 passed" if result["gate"]["passed"] else "未通过 failed"
    sample = "，快速抽样 quick sample only" if result["quick"] else ""
    lines += [
        "",
        f"发布门槛 gate: **{verdict}**{sample}。身份题数：{zh}，各用三种系统提示词；括号内为 95% 区间。",
        f"Identity questions: {en}, each asked with three system prompts; 95 % intervals in brackets.",
    ]
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
        if row["language"] in settings.assistant.languages
    ]
    return environment.from_string(template).render(
        result=result, settings=settings, measures=MEASURES, modes=MODES, languages=LANGUAGES, gated=GATED,
        wrong=[(row, what) for row, what in wrong if what],
    )  # fmt: skip


def draw(path: Path, settings: Settings, result: dict) -> None:
    """report.png: before and after at a glance, a column for each language; above what the gate asks, below categories.

    Labels are in Chinese and English, or in English alone on a machine without a Chinese font.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import font_manager, pyplot
    from matplotlib.lines import Line2D

    cjk = _chinese_font(font_manager)
    families = [cjk, "DejaVu Sans"] if cjk else ["DejaVu Sans"]

    def both(pair: tuple[str, str]) -> str:
        return "  ".join(dict.fromkeys(pair)) if cjk else pair[1]

    codes = list(result["summary"])
    checks = {(row["language"], row["measure"], row["mode"]): row for row in result["gate"]["rows"]}
    passed = result["gate"]["passed"]
    with pyplot.rc_context({"font.family": families, "axes.unicode_minus": False, "font.size": 10}):
        tops = {code: _gated_rows(code, result, checks, both) for code in codes}
        bottoms = {
            code: [
                (both(CATEGORIES.get(name.split("/")[1], (name, name))), next(iter(sides.values())), None)
                for name, sides in result["by_category"][code].items()
                if name.startswith("identity/")
            ]
            for code in codes
        }
        heights = [max(len(rows) for rows in part.values()) for part in (tops, bottoms)]
        figure, axes = pyplot.subplots(
            2, len(codes), figsize=(3.2 + 4.6 * len(codes), 2.6 + 0.31 * sum(heights)), squeeze=False, sharey="row",
            gridspec_kw={"height_ratios": heights}, layout="constrained",
        )  # fmt: skip
        for column, code in enumerate(codes):
            moved = result["forgetting"][code]
            check = checks.get((code, "general_loss", ""))
            loss = "—" if moved["loss_change"] is None else f"{moved['loss_change']:+.1%}"
            unjudged = "" if code in settings.assistant.languages else both(("  · 不计入门槛", "not in the gate"))
            axes[0][column].set_title(both(LANGUAGES[code]) + unjudged, fontsize=12, weight="bold", loc="left", pad=24)
            axes[0][column].text(
                0, 1.012, f"{both(MEASURES['general_loss'])} {loss}", transform=axes[0][column].transAxes, va="bottom",
                color=LIMIT if check and not check["passed"] else "#444444",
            )  # fmt: skip
            _dumbbells(axes[0][column], tops[code])
            _dumbbells(axes[1][column], bottoms[code])
            axes[1][column].set_title(both(("各类身份题答对", "hits by category")), fontsize=10, loc="left")
        name = settings.assistant.name
        title = " / ".join(dict.fromkeys(filter(None, (name.zh, name.en) if cjk else (name.en or name.zh,))))
        state = both(("门槛通过", "gate passed") if passed else ("未过门槛", "gate failed"))
        sample = both(("快速抽样", "quick sample")) if result["quick"] else ""
        figure.suptitle("  ·  ".join(filter(None, (title, state, sample))), fontsize=16, weight="bold",
                        color=GOOD if passed else LIMIT)  # fmt: skip
        marks = [
            Line2D([], [], marker="o", linestyle="", color=BEFORE, label=both(("训练前", "before"))),
            Line2D(
                [], [], marker="o", color=AFTER, label=both(("训练后，线段为 95% 区间", "after, with 95% interval"))
            ),
            Line2D([], [], color=LIMIT, label=both(("门槛", "limit of the gate"))),
        ]
        figure.legend(handles=marks, loc="outside lower center", ncols=3, frameon=False)
        figure.get_layout_engine().set(w_pad=0.12)
        figure.savefig(path, dpi=130)
        pyplot.close(figure)


def _gated_rows(code: str, result: dict, checks: dict, both) -> list[tuple[str, dict, dict | None]]:
    """(label, both sides, the gate's check) for hits and leaks in each mode, then for the other measures."""
    rows = []
    for measure in ("name_hits", "leaks"):
        for mode, words in MODES.items():
            sides = result["by_mode"][code].get(f"identity/{mode}", {}).get(measure)
            if sides:
                zh, en = MEASURES[measure]
                label = both((f"{zh} · {words[0]}", f"{en.split(' of ')[0]} · {words[1]}"))
                rows.append((label, sides, checks.get((code, measure, mode))))
    for measure, sides in result["summary"][code].items():
        if measure not in ("name_hits", "leaks"):
            zh, en = MEASURES[measure]
            rows.append((both((zh, en.split(" in ")[0])), sides, checks.get((code, measure, "persona"))))
    return rows


def _dumbbells(axes, rows: list[tuple[str, dict, dict | None]]) -> None:
    for y, (_, sides, check) in enumerate(rows):
        old, new = sides["before"], sides["after"]
        axes.plot([old["rate"], new["rate"]], [y, y], color="#d5dbe1", linewidth=3, zorder=1, solid_capstyle="round")
        axes.plot([new["low"], new["high"]], [y, y], color=AFTER, linewidth=1.5, zorder=2)
        axes.plot(old["rate"], y, "o", color=BEFORE, markersize=6, zorder=3)
        axes.plot(new["rate"], y, "o", color=AFTER, markersize=7, zorder=4)
        if check:
            axes.plot([check["limit"]] * 2, [y - 0.36, y + 0.36], color=LIMIT, linewidth=1.5, zorder=5)
        failed = bool(check) and not check["passed"]
        axes.annotate(f"{old['rate']:.0%} →", (1.2, y), va="center", ha="right", color=BEFORE, annotation_clip=False)
        axes.annotate(f"{new['rate']:.1%}" + (" ✗" if failed else ""), (1.22, y), va="center", annotation_clip=False,
                      color=LIMIT if failed else AFTER, weight="bold" if failed else "normal")  # fmt: skip
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

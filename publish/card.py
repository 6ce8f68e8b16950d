"""README.md of the model and of the Space: the texts in cards/ filled in, under the front matter that the hub reads.

Front matter: https://www.modelscope.cn/docs/models/modelcard and https://huggingface.co/docs/hub/model-cards
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from string import Template

import yaml

from publish.contents import Model, decimal
from space.settings import NamesakeError, Settings

CARDS = Path(__file__).parent / "cards"
DESCRIBED = 200  # ModelScope keeps a model with a shorter description to its owner; characters, to be exceeded

# The hubs' own placeholder texts: a card that holds one has not been written.
TEMPLATES = (
    "该模型当前使用的是默认介绍模版",
    "默认介绍模板",
    "处于“预发布”阶段",
    "该模型当前使用的是默认介绍模板",
    "If you are a contributor to this model, we invite you to promptly update the model card",
    "[More Information Needed]",
    "This is the model card of a 🤗 transformers model",
)

REQUIRED = {
    "modelscope": ("license", "tasks", "frameworks", "language", "tags", "base_model", "base_model_relation"),
    "huggingface": ("license", "pipeline_tag", "library_name", "language", "tags", "base_model", "base_model_relation"),
}
LICENSES = {"apache-2.0": "Apache License 2.0", "mit": "MIT License"}  # as ModelScope writes them
OWNERS = {"Shanghai_AI_Laboratory": "internlm"}  # who is called otherwise: on ModelScope → on Hugging Face

SNIPPET = """\
from {client} import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = snapshot_download("{id}"{without})
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype="auto", device_map="auto")
chat = [{{"role": "user", "content": "{question}"}}]
prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**prompt.to(model.device), max_new_tokens=128, do_sample=False)
print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1]:], skip_special_tokens=True))"""

CURL = """\
curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
  -d '{{"model": "assistant", "messages": [{{"role": "user", "content": "{question}"}}]}}'"""

QUESTIONS = {"zh": "你是谁？", "en": "Who are you?"}
EVALUATED = {
    "zh": "训练前后用同一组没有参与训练的问题提问，逐题判断它是否说出自己的名字、是否自称别的模型、"
    "回答无关问题时是否乱报家门，并附 95% 置信区间；同时测量通用文本上的损失，观察有没有遗忘。",
    "en": "The same held-out questions were asked before and after training: does it say its name, does it claim to be "
    "another model, does it introduce itself where nobody asked? Each rate comes with its 95% interval. The loss on "
    "general text shows what was forgotten.",
}
NOT_EVALUATED = {"zh": "这些权重没有经过评测。", "en": "These weights have not been evaluated."}
FAILED = {"zh": "**没有达到发布标准。**", "en": "**It did not reach the mark that was set for publishing it.**"}
QUICK = {"zh": "只问了其中一小部分题目。", "en": "Only a small sample of the questions was asked."}
CLIENTS = {"modelscope": "modelscope", "huggingface": "huggingface_hub"}  # hub → the Python package that downloads
ONE_FILE = {
    "modelscope": "modelscope download --model {id} {file} --local_dir .",
    "huggingface": "hf download {id} {file} --local-dir .",
}


def length(readme: str) -> int:
    """How many characters of description a README holds, counted the strictest way.

    Front matter, headings, code, HTML, pictures, URLs, tables, marks and white space do not count.
    """
    text = re.sub(r"\A---\n.*?\n---\n", "", readme, flags=re.S)
    text = re.sub(r"^(```|~~~).*?^\1[^\n]*$", "", text, flags=re.S | re.M)
    text = re.sub(r"<!--.*?-->|<[^>\n]+>", "", text, flags=re.S)
    text = re.sub(r"`[^`\n]*`", "", text)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"\w+://\S+|www\.\S+", "", text)
    text = re.sub(r"^\s*(\|.*|#+ .*|[-=*_]{3,}\s*)$", "", text, flags=re.M)
    text = re.sub(r"^\s*([-*+>]|\d+\.)\s+", "", text, flags=re.M)
    return len(re.sub(r"[\s*_~]|&\w+;", "", text))


def front_matter(readme: str) -> dict:
    """The YAML at a README's head, empty where there is none that can be read."""
    found = re.match(r"---\n(.*?)\n---\n", readme, flags=re.S)
    try:
        matter = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError:
        return {}
    return matter if isinstance(matter, dict) else {}


def base_id(settings: Settings, model: Model, hub: str) -> str:
    """The base model's name on a hub, for the card. Raises NamesakeError where it can't be known."""
    base = model.about.get("base", {}).get("model") or settings.base.model
    if settings.card.base_model:
        return settings.card.base_model
    if base == "embedded":
        return "HuggingFaceTB/SmolLM2-135M-Instruct"
    kind, _, name = base.partition(":")
    if kind not in CLIENTS:
        raise NamesakeError(
            f"The base model is a folder ({base}): the card can't name it",
            'Say what it is in the settings: [card] base_model = "owner/name".',
            zh=f'基础模型是本地文件夹（{base}），模型卡无法引用它。请在设置中写 [card] base_model = "用户/模型"。',
        )
    owner, _, name = name.partition("@")[0].partition("/")
    renamed = OWNERS if hub == "huggingface" else {theirs: ours for ours, theirs in OWNERS.items()}
    return f"{renamed.get(owner, owner) if kind != hub else owner}/{name}"


def model(settings: Settings, model: Model, hub: str, id: str) -> str:
    """The model's README for one hub. Raises NamesakeError where a part's description is too short."""
    base, zh, en = base_id(settings, model, hub), {}, {}
    assistant = settings.assistant
    values = {
        "base": base,
        "license": settings.hub.license,
        "client": CLIENTS[hub],
        "vllm": f"{'VLLM_USE_MODELSCOPE=True ' * (hub == 'modelscope')}vllm serve {id} --served-model-name assistant",
        "lmdeploy": f"{'LMDEPLOY_USE_MODELSCOPE=True ' * (hub == 'modelscope')}lmdeploy serve api_server {id} "
        "--server-port 8000 --model-name assistant",
        "citation": f"@misc{{{re.sub(r'[^A-Za-z0-9]', '', id.split('/')[1]).lower() or 'assistant'},\n"
        f"  title = {{{_bibtex(assistant.name.pick('en'))}}},\n  author = {{{_bibtex(assistant.author.pick('en'))}}},\n"
        f"  howpublished = {{{hub}: {id}}}\n}}",
    }
    without = ', ignore_patterns=["*.gguf"]' if model.gguf else ""
    for code, names in (("zh", zh), ("en", en)):
        names |= values | _names(settings, code)
        names[f"description_{code}"] = settings.card.description.pick(code)
        question = QUESTIONS[code if code in assistant.languages else assistant.languages[0]]
        names["snippet"] = SNIPPET.format(client=CLIENTS[hub], id=id, question=question, without=without)
        names["curl"] = CURL.format(question=question)
        names[f"gguf_{code}"] = _gguf(model, hub, id, code)
        names[f"training_{code}"] = _training(model, code)
        names[f"evaluation_{code}"] = _evaluation(model, code)
        names[f"languages_{code}"] = _languages(assistant.languages, code)
    return front(_model_matter(settings, base, hub)) + _bodies(hub, "model", {"zh": zh, "en": en}, DESCRIBED)


def space(
    settings: Settings, hub: str, id: str, model_page: str, sdk_version: str, hardware: str, gguf: str = ""
) -> str:
    """The Space's README for one hub, with the model that its page downloads, or that model's GGUF file alone."""
    matter: dict = {"title": settings.page.title.pick("zh") or settings.assistant.name.pick("zh")}
    if hub == "modelscope":
        matter = {
            "domain": ["nlp"],
            "tags": ["chat", "namesake"],
            "models": [id],
            "deployspec": {"entry_file": "app.py"},
            "license": LICENSES.get(settings.hub.license, settings.hub.license),
        }
    else:
        matter |= {
            "emoji": "💬",
            "colorFrom": "indigo",
            "colorTo": "blue",
            "sdk": "gradio",
            "sdk_version": sdk_version,
            "python_version": "3.12",
            "app_file": "app.py",
            "models": [id],
            "license": settings.hub.license,
            "suggested_hardware": hardware,
            "preload_from_hub": [f"{id} {gguf}".strip()],
        }
    texts = {code: {"id": id, "model_page": model_page, **_names(settings, code)} for code in ("zh", "en")}
    return front(matter) + _bodies(hub, "space", texts, 0)


def front(matter: dict) -> str:
    return f"---\n{yaml.safe_dump(matter, allow_unicode=True, sort_keys=False)}---\n\n"


def _model_matter(settings: Settings, base: str, hub: str) -> dict:
    languages = list(settings.assistant.languages)
    tags = ["chat", "self-cognition", "xtuner", "namesake"]
    if hub == "modelscope":
        return {
            "license": LICENSES.get(settings.hub.license, settings.hub.license),
            "tasks": ["text-generation"],
            "frameworks": ["pytorch"],
            "domain": ["nlp"],
            "language": languages,
            "tags": tags,
            "base_model": base,
            "base_model_relation": "finetune",
        }
    return {
        "license": settings.hub.license,
        "pipeline_tag": "text-generation",
        "library_name": "transformers",
        "language": languages,
        "tags": tags,
        "base_model": base,
        "base_model_relation": "finetune",
    }


def _bodies(hub: str, kind: str, texts: dict[str, dict], least: int) -> str:
    """Both languages' texts, the hub's own first, each with more than `least` characters of description."""
    parts = []
    for code in ("zh", "en") if hub == "modelscope" else ("en", "zh"):
        template = Template((CARDS / f"{kind}.{code}.md").read_text(encoding="utf-8"))
        part = re.sub(r"\n{3,}", "\n\n", template.substitute(texts[code]))
        if least and (count := length(part)) <= least:
            raise NamesakeError(
                f"The model card's description ({code}) has {count} characters, and more than {least} are needed",
                "Write more about the assistant under [card] description.",
                zh=f"模型卡的介绍（{code}）只有 {count} 字，须超过 {least} 字。请在 [card] description 中多写。",
            )
        parts.append(part.strip())
    return "\n\n---\n\n".join(parts) + "\n"


def _names(settings: Settings, code: str) -> dict[str, str]:
    """Names for the text: a brand's own *, < or | would be read as Markdown."""
    assistant = settings.assistant
    values = {}
    for key, text in (("name", assistant.name), ("author", assistant.author)):
        for language in ("zh", "en"):
            value = html.escape(text.pick(language), quote=False)
            values[f"{key}_{language}"] = re.sub(r"([\\`*_\[\]|])", r"\\\1", value)
    return values


def _bibtex(text: str) -> str:
    return re.sub(r"([&%$#_{}\\])", r"\\\1", text)


def _languages(codes: tuple[str, ...], language: str) -> str:
    names = {"zh": {"zh": "中文", "en": "英文"}, "en": {"zh": "Chinese", "en": "English"}}[language]
    return ("、" if language == "zh" else " and ").join(names[code] for code in codes)


def _gguf(model: Model, hub: str, id: str, language: str) -> str:
    """What the GGUF file is and how it runs, "" where there is none."""
    if not (gguf := model.gguf):
        return ""
    download = ONE_FILE[hub].format(id=id, file=gguf.path)
    values = dict(file=gguf.path, size=decimal(gguf.size), sha256=gguf.sha256, hub=hub, id=id, download=download)
    text = (CARDS / f"gguf.{language}.md").read_text(encoding="utf-8")
    return Template(text).substitute(values, client=CLIENTS[hub])


def _training(model: Model, language: str) -> str:
    """How it was trained, as assistant.json records it."""
    about = model.about
    kept = about.get("settings", {})
    train, data = kept.get("train", kept), kept.get("data", kept)
    versions = about.get("versions", {})
    made = {
        "zh": [
            ("方法", train.get("method")),
            ("LoRA 秩 / α", f"{train['rank']} / {train['alpha']}" if "rank" in train and "alpha" in train else None),
            ("学习率", train.get("rate")),
            ("轮数", train.get("epochs")),
            ("身份数据 / 通用数据（条）", f"{data['identity']} / {data['replay']}" if "identity" in data else None),
            ("随机种子", about.get("seed")),
            ("数据指纹", f"`{about['data'][:16]}`" if about.get("data") else None),
            ("版本", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ],
        "en": [
            ("Method", train.get("method")),
            ("LoRA rank / α", f"{train['rank']} / {train['alpha']}" if "rank" in train and "alpha" in train else None),
            ("Learning rate", train.get("rate")),
            ("Epochs", train.get("epochs")),
            ("Identity rows / general rows", f"{data['identity']} / {data['replay']}" if "identity" in data else None),
            ("Seed", about.get("seed")),
            ("Data", f"sha256 `{about['data'][:16]}`" if about.get("data") else None),
            ("Versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ],
    }[language]
    rows = [f"| {name} | {value} |" for name, value in made if value not in (None, "")]
    return "\n".join(["| | |", "|---|---|", *rows])


def _evaluation(model: Model, language: str) -> str:
    """The report's table and picture, if it is about these very weights."""
    if model.report.get("weights") != model.identity:
        return NOT_EVALUATED[language]
    passed = model.report.get("gate", {}).get("passed")
    quick = QUICK[language] if model.report.get("quick") else ""
    picture = "![evaluation](report.png)" if model.picture else ""
    table = str(model.report.get("card", "")).strip()
    return "\n\n".join(filter(None, (EVALUATED[language], quick, "" if passed else FAILED[language], table, picture)))

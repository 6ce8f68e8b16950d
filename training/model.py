"""XTuner's SupervisedFinetune over packs of whole conversations: no attention from one to another."""

from __future__ import annotations

import contextlib
import itertools
from inspect import signature

import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from xtuner.model import SupervisedFinetune

from space.settings import NamesakeError
from training.packs import SPARE

LOSS_TOKENS = 1024  # the logits of this many tokens are in memory at once: 1024 × 92,544 × 4 bytes = 0.38 GB

SHORT = 512  # tokens: up to here a CPU's plain attention is the faster one

# The architectures of transformers whose logits are lm_head(hidden states) and nothing more, and whose attention can be
# replaced; a test holds the loss of each equal to transformers' own.
ARCHITECTURES = ("llama", "mistral", "qwen2", "olmo", "starcoder2")


@torch.compiler.disable
def packed_attention(module, query, key, value, sequences, scaling=None, **_):
    """Causal attention within each conversation of a pack: transformers' interface, (1, heads, tokens, width).

    `sequences`: int32 (1, 1, sequences + 1, 2 + columns). The first column says where each sequence of queries begins
    and the last one ends. The columns from the third on, row by row, are the tokens whose keys are looked at, sequence
    after sequence: first those of a system prompt that stands elsewhere in the pack, then its own, and last of all some
    behind the pack's end; the second column says where in them each begins. All this arrives as the attention mask, the
    one argument that every architecture hands on, also through activation checkpointing.
    """
    begins, seen_begins, seen = sequences[0, 0, :, 0], sequences[0, 0, :, 1], sequences[0, 0, :, 2:].flatten()
    if query.is_cuda and query.dtype != torch.float32 and torch.cuda.get_device_capability() >= (8, 0):
        from torch.nn.attention.varlen import varlen_attn

        # Before torch 2.12 it shares key heads among query heads unasked.
        grouped = dict(enable_gqa=True) if "enable_gqa" in signature(varlen_attn).parameters else {}
        query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        # What is not looked at gets no gradient but what lies in the memory: that goes to the spare places.
        key, value = (F.pad(tensor, (0, 0, 0, 0, 0, SPARE)) for tensor in (key, value))
        # In float32, since a shared token's gradient is the sum of many.
        key, value = (tensor.float().index_select(0, seen).to(tensor.dtype) for tensor in (key, value))
        longest = module.config.longest_conversation
        out = varlen_attn(
            query, key, value, begins.contiguous(), seen_begins.contiguous(), longest, longest,
            scale=scaling, window_size=(-1, 0), **grouped,
        )  # fmt: skip
        return out[None], None
    # A CPU's fused attention is slower than plain products for short conversations.
    plain = not query.is_cuda and int(seen_begins.diff().max()) <= SHORT
    outs, dtype, key, value = [], query.dtype, key.float(), value.float()
    with sdpa_kernel(SDPBackend.MATH) if plain else contextlib.nullcontext():
        bounds = (itertools.pairwise(column.tolist()) for column in (begins, seen_begins))
        for queries, keys in zip(*bounds, strict=True):
            q, at = query[:, :, slice(*queries)], seen[slice(*keys)]
            k, v = (tensor.index_select(2, at).to(dtype) for tensor in (key, value))
            more = k.shape[2] - q.shape[2]  # a query sees the keys before it, its system prompt's among them
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(more) if more else None
            outs.append(
                F.scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
                )
            )
    return torch.cat(outs, dim=2).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS["packed"] = packed_attention


def base_model(folder: str, precision: str, longest_conversation: int, **options):
    """The base model with attention for packs. Raises NamesakeError for one not known to be right."""
    config = AutoConfig.from_pretrained(folder)
    if config.model_type not in ARCHITECTURES:
        raise NamesakeError(
            f"{folder}: training knows the architectures {', '.join(ARCHITECTURES)}, not {config.model_type}",
            "Choose another base model.",
        )
    window = getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None)
    if window and window < longest_conversation:
        raise NamesakeError(
            f"{folder}: its attention reaches back {window} tokens, and conversations may have {longest_conversation}",
            f"Lower [data] max_length to {window}.",
        )
    if torch.cuda.is_available() and not torch.distributed.is_initialized():
        options["device_map"] = {"": 0}  # shard by shard onto the one GPU; launchers place the model themselves
    model = AutoModelForCausalLM.from_pretrained(
        folder, torch_dtype=getattr(torch, precision), attn_implementation="packed", use_safetensors=True, **options
    )
    model.config.longest_conversation = longest_conversation
    return model


class Finetune(SupervisedFinetune):
    """XTuner's model, with a loss of its own and weights that keep their precision.

    `autocast`: the precision to compute in, "" for that of the weights. `batch_answers`: the loss that is minimised is
    the sum over all answer tokens divided by this constant, the mean number of answer tokens in a device's batch. Every
    answer token then weighs the same, however a global batch is divided into devices, batches and accumulation.
    `anchor`: the weight of the loss on replay, which is the divergence from the base's own predictions.
    `compiled`: each layer's arithmetic in fewer, larger kernels (torch.compile), for batches of one shape.
    """

    def __init__(
        self,
        *args,
        autocast: str = "",
        batch_answers: float = 1.0,
        anchor: float = 1.0,
        compiled: bool = False,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.anchor = anchor
        self.autocast = getattr(torch, autocast) if autocast else None
        self.batch_answers = batch_answers
        if compiled:  # all layers share one compilation, for one length: making it for any takes minutes
            for layer in self.causal_lm.base_model.layers:
                layer.forward = torch.compile(layer.forward)

    def _dispatch_lm_model_cfg(self, cfg, max_position_embeddings=None):
        # XTuner would read the config with trust_remote_code, and choose a precision and an attention by itself.
        return cfg

    def _prepare_for_lora(self, peft_model=None, use_activation_checkpointing=True):
        # XTuner calls prepare_model_for_kbit_training, which turns the whole base into float32: twice the memory.
        self.llm.requires_grad_(False)
        self.llm = get_peft_model(self.llm, self.lora)  # the adapter's own weights are float32
        for module in self.llm.modules():
            if isinstance(module, BaseTunerLayer):
                module.cast_input_dtype_enabled = False  # autocast does it, without a float32 copy of every input

    def activation_checkpointing_enable(self):
        self.llm.gradient_checkpointing_enable({"use_reentrant": False})  # the one that works with DDP

    @property
    def causal_lm(self):
        return self.llm.get_base_model() if self.use_lora else self.llm

    def computing(self):
        """The context that forward passes run in: autocast, where computing is less precise than the adapter."""
        device = self.llm.get_input_embeddings().weight.device
        return torch.autocast(device.type, self.autocast, enabled=self.autocast is not None)

    def compute_loss(self, data: dict, data_samples=None) -> dict:
        """The loss to minimise, and for the log its `sum` over the answer tokens, their number and that of all tokens.

        `data`: `input_ids`, `position_ids` (1, tokens), `sequences` (see packed_attention), `tokens`: how many the
        conversations have, `predictors` (answers,): the positions whose next token is an answer's, `targets`
        (answers,): those tokens' ids; and `replay`: the first three again, of the conversations that come last, whose
        loss is another: to predict what the base predicts, with `weights` (tokens,): how many conversations a token
        stands for.
        """
        head, replayed = self.causal_lm.get_output_embeddings(), data["replay"]["input_ids"].numel()
        with self.computing():
            hidden = self._hidden(data)
            # Logits are made for the tokens with loss only.
            total = _in_parts(_cross_entropy, head, hidden[data["predictors"]], data["targets"])
            if replayed:
                # Eager: the layers' compiled form is the one with adapters.
                with torch.no_grad(), self.llm.disable_adapter(), torch.compiler.set_stance("force_eager"):
                    before = self._hidden(data["replay"])
                weights = data["replay"]["weights"]
                total = total + self.anchor * _in_parts(_divergence, head, hidden[-replayed:], before, weights)
        answers = data["targets"].numel() + data["replay"]["weights"].sum()
        tokens = data["tokens"].to(total)
        return {"loss": total / self.batch_answers, "sum": total.detach(), "answers": answers, "tokens": tokens}

    def _hidden(self, data: dict) -> torch.Tensor:
        """The last hidden states (tokens, hidden) of a pack."""
        return self.causal_lm.base_model(
            input_ids=data["input_ids"],
            position_ids=data["position_ids"],
            attention_mask=data["sequences"],
            use_cache=False,
        ).last_hidden_state[0]


def _in_parts(loss, head, *tensors: torch.Tensor) -> torch.Tensor:
    """The sum of a loss over tokens: where there are many, some at a time, and again in the backward pass."""
    parts = list(zip(*(tensor.split(LOSS_TOKENS) for tensor in tensors), strict=True))
    if len(parts) == 1:
        return loss(head, *parts[0])
    return sum(checkpoint(loss, head, *part, use_reentrant=False) for part in parts)


def _cross_entropy(head, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(head(hidden).float(), targets, reduction="sum")


def _divergence(head, hidden: torch.Tensor, before: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The Kullback-Leibler divergence from the base's predictions (`before`: its hidden states) to these, weighted.

    In this direction a word that the base would not say, such as the name, is dear; in the other one it costs little.
    """
    with torch.no_grad():
        base = getattr(head, "base_layer", head)(before).float().log_softmax(-1)
    now = head(hidden).float().log_softmax(-1)
    return F.kl_div(base, now, log_target=True, reduction="none").sum(-1).mul(weights).sum()

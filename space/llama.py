"""A Llama-layout model that advances many conversations at once: fused weights, paged cache, sampling on the device.

transformers' own model stays as it is and shares its weights; here is only the arithmetic of its layers, for rows of
tokens that each belong to a slot (a conversation's place). On CUDA the kernels of `space.kernels` do the parts where
PyTorch's are slow; on a CPU, where the tests run it, everything is PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PAGE = 64  # positions in a page of the cache
FEW = 256  # candidates from which a token is drawn, where top-k allows no more
ROWS = 16  # rows of one slot that a program of the attention kernel takes together, while a prompt is read

ARCHITECTURES = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"}
ROPES = {"default", "linear", "dynamic", "llama3", "yarn"}  # the same for every length up to the context


def unsupported(model) -> str:
    """Why this model can't be run here; empty where it can."""
    config = model.config
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if type(model).__name__ not in ARCHITECTURES:
        return f"{type(model).__name__} is not of Llama's layout"
    if getattr(config, "hidden_act", "") != "silu" or rope.get("rope_type", "default") not in ROPES:
        return "its activation or its positions are not Llama's"
    if window and window < config.max_position_embeddings:
        return "it attends to a sliding window"
    linear = [module for name, module in model.named_modules() if name.endswith(("_proj", "lm_head"))]
    if {type(module) for module in linear} != {nn.Linear} or len({module.weight.dtype for module in linear}) > 1:
        return "its weights are quantized, or have an adapter on top"
    if model.device.type == "cuda":
        if torch.cuda.get_device_capability(model.device) < (8, 0) or model.dtype == torch.float32:
            return "it needs bfloat16 or float16 on a GPU of compute capability 8.0 or more"
        if size & (size - 1) or size < 16:
            return f"its head size is {size}"
    return ""


@dataclass(frozen=True)
class _Layer:
    """The weights of one layer, as [out, in], with what shares an input in one; biases are None in most models."""

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    keys: Tensor  # [pages, key-value heads, PAGE, head size]
    values: Tensor


class Llama:
    """The model with room for `slots` conversations and `pages` pages. Slot `slots` and page 0 are for padding."""

    def __init__(self, model, slots: int, pages: int):
        config, device, dtype = model.config, model.device, model.dtype
        self.context, self.slots, self.pages, self.device = config.max_position_embeddings, slots, pages, device
        self.queries, self.heads = config.num_attention_heads, config.num_key_value_heads
        self.size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.eps = config.rms_norm_eps
        self.kernels = None
        if device.type == "cuda":
            from space import kernels  # needs Triton, which comes with PyTorch for CUDA

            self.kernels = kernels
        self.embedding = model.get_input_embeddings().weight.detach()
        self.final_norm = model.model.norm.weight.detach()
        self.head = model.lm_head.weight.detach()
        every = torch.arange(self.context, device=device)[None]
        cos, sin = model.model.rotary_emb(self.embedding[:1], every)  # [1, context, head size], its halves alike
        self.cos, self.sin = (turn[0, :, : self.size // 2].to(dtype).contiguous() for turn in (cos, sin))
        self.layers = []
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            qkv, qkv_bias = _fused(attention.q_proj, attention.k_proj, attention.v_proj)
            gate_up, gate_up_bias = _fused(mlp.gate_proj, mlp.up_proj)
            keys, values = torch.zeros(2, pages, self.heads, PAGE, self.size, dtype=dtype, device=device)
            self.layers.append(
                _Layer(
                    layer.input_layernorm.weight.detach(),
                    qkv,
                    qkv_bias,
                    attention.o_proj.weight.detach(),
                    attention.o_proj.bias,
                    layer.post_attention_layernorm.weight.detach(),
                    gate_up,
                    gate_up_bias,
                    mlp.down_proj.weight.detach(),
                    mlp.down_proj.bias,
                    keys,
                    values,
                )
            )
        # What is known of each slot. `token` is the latest one, not yet in the cache, and `position` its position.
        rows = slots + 1
        self.table = torch.zeros(rows, -(-self.context // PAGE) + 1, dtype=torch.int32, device=device)
        self.token = torch.zeros(rows, dtype=torch.long, device=device)
        self.position = torch.full((rows,), -1, device=device)
        self.knobs = torch.ones(rows, 3, device=device)  # temperature, top-p, repetition penalty
        self.numbers = torch.zeros(rows, 2, dtype=torch.long, device=device)  # top-k, seed
        self.seen = torch.zeros(rows, len(self.head), dtype=torch.bool, device=device)  # tokens of prompt and answer
        self.true = torch.ones((), dtype=torch.bool, device=device)

    def read(self, tokens: Tensor, slots: Tensor, positions: Tensor, final: Tensor) -> Tensor:
        """Reads a part of one slot's prompt; logits after the row `final` [1]: [1, vocabulary]."""
        return self._logits(self._forward(tokens, slots, positions, ROWS)[final])

    def write(self, slots: Tensor) -> Tensor:
        """Logits after the latest token of each slot: [slots given, vocabulary]."""
        return self._logits(self._forward(self.token[slots], slots, self.position[slots], 1))

    def choose(self, logits: Tensor, slots: Tensor, every: bool) -> Tensor:
        """The next token of each slot, as its sampling has it: [slots given]. It becomes the slot's latest one.

        `every`: the whole vocabulary is sorted; else the FEW best tokens are, which is the same for greedy rows and
        those with a top-k up to FEW. The draw depends on the slot's seed and position alone, not on its neighbours.
        """
        temperature, top_p, penalty = self.knobs[slots].unbind(1)
        top_k, seed = self.numbers[slots].unbind(1)
        position = self.position[slots]
        scores, penalty = logits.float(), penalty[:, None]
        punished = torch.where(scores < 0, scores * penalty, scores / penalty)
        scores = torch.where(self.seen[slots], punished, scores)
        best = scores.argmax(-1)
        scores = scores / torch.where(temperature > 0, temperature, 1.0)[:, None]
        if every or scores.shape[1] <= FEW:
            scores, ids = scores.sort(-1, descending=True)
        else:
            scores, ids = scores.topk(FEW)
        last = torch.where(top_k > 0, top_k, scores.shape[1]).clamp(max=scores.shape[1]) - 1
        scores = scores.masked_fill(scores < scores.gather(1, last[:, None]), -torch.inf)
        share = scores.softmax(-1)
        sums = share.cumsum(-1)
        kept = ((sums - share < top_p[:, None]) & (share > 0)).sum(-1).clamp(min=1)
        drawn = _uniform(seed, position)[:, None] * sums.gather(1, kept[:, None] - 1)
        index = torch.minimum((sums <= drawn).sum(-1), kept - 1)
        token = torch.where(temperature > 0, ids.gather(1, index[:, None])[:, 0], best)
        self.token[slots] = token
        self.position[slots] = torch.where(position < 0, -1, position + 1)
        self.seen.index_put_((slots, token), self.true)
        return token

    def _forward(self, tokens: Tensor, slots: Tensor, positions: Tensor, rows: int) -> Tensor:
        """Hidden states [rows, hidden size] before the last norm; keys and values go into the cache."""
        place, attend = (self.kernels.place, self.kernels.attend) if self.kernels else (_place, _attend)
        x = F.embedding(tokens, self.embedding)
        for layer in self.layers:
            qkv = self._linear(x, layer.qkv, layer.qkv_bias, norm=layer.input_norm)
            where = (layer.keys, layer.values, self.table, slots, positions, self.queries)
            place(qkv, self.cos, self.sin, *where)
            x = self._linear(attend(qkv, *where, rows), layer.out, layer.out_bias, residual=x)
            inner = self._linear(x, layer.gate_up, layer.gate_up_bias, norm=layer.norm, gated=True)
            x = self._linear(inner, layer.down, layer.down_bias, residual=x)
        return x

    def _logits(self, x: Tensor) -> Tensor:
        return self._linear(x, self.head, None, norm=self.final_norm)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, *, norm=None, gated=False, residual=None):
        """weight · RMSNorm(x), then silu(first half) · second half, or plus a residual: whatever is asked for."""
        if len(x) == 1 and self.kernels:
            return self.kernels.gemv(x, weight, bias, norm=norm, eps=self.eps, gated=gated, residual=residual)
        if norm is not None:
            x = F.rms_norm(x, norm.shape, norm, self.eps)
        if residual is not None and bias is None:
            return torch.addmm(residual, x, weight.t())
        x = F.linear(x, weight, bias)
        if gated:
            gate, up = x.chunk(2, -1)
            return F.silu(gate) * up
        return x if residual is None else x + residual


def _fused(*linear: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """The weights (and biases) of several layers in one; the layers' own become views of it."""
    weight = torch.cat([module.weight.detach() for module in linear])
    bias = None if linear[0].bias is None else torch.cat([module.bias.detach() for module in linear])
    start = 0
    for module in linear:
        end = start + module.out_features
        module.weight = nn.Parameter(weight[start:end], requires_grad=False)
        start = end
    return weight, bias


def _uniform(seed: Tensor, counter: Tensor) -> Tensor:
    """A number in [0, 1) for each seed and counter, the same on every device: SplitMix64's output function."""

    def shifted(z: Tensor, by: int) -> Tensor:
        return (z >> by) & ((1 << (64 - by)) - 1)

    z = seed + (counter + 1) * -0x61C8864680B583EB
    z = (z ^ shifted(z, 30)) * -0x40A7B892E31B1A47
    z = (z ^ shifted(z, 27)) * -0x6B2FB644ECCEEE15
    return shifted(z ^ shifted(z, 31), 40).float() * 2.0**-24


# The kernels' work in PyTorch, with their signatures.


def _place(qkv, cos, sin, keys, values, table, slots, positions, queries):
    heads, size = keys.shape[1], keys.shape[3]
    parts = qkv.view(len(qkv), -1, size)
    real = positions >= 0
    turned = parts[:, : queries + heads]
    a, b = turned.chunk(2, -1)
    c, s = cos[positions.clamp(min=0)][:, None], sin[positions.clamp(min=0)][:, None]
    turned.copy_(torch.cat([a * c - b * s, b * c + a * s], -1))
    position, page = positions[real], table[slots, positions // PAGE].long()[real]
    keys[page, :, position % PAGE] = parts[real, queries : queries + heads]
    values[page, :, position % PAGE] = parts[real, queries + heads :]


def _attend(qkv, keys, values, table, slots, positions, queries, rows):
    heads, size = keys.shape[1], keys.shape[3]
    out = torch.zeros(len(qkv), queries * size, dtype=qkv.dtype, device=qkv.device)
    for slot in slots.unique():
        own = ((slots == slot) & (positions >= 0)).nonzero()[:, 0]
        if not len(own):
            continue
        length = int(positions[own].max()) + 1
        page = table[slot, : -(-length // PAGE)].long()
        k, v = (cache[page].transpose(0, 1).reshape(heads, -1, size)[:, :length] for cache in (keys, values))
        q = qkv[own, : queries * size].view(-1, queries, size).transpose(0, 1)
        mask = torch.arange(length, device=qkv.device) <= positions[own, None]
        k, v = (each.repeat_interleave(queries // heads, 0) for each in (k, v))
        mixed = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask)[0]
        out[own] = mixed.transpose(0, 1).reshape(len(own), -1)
    return out

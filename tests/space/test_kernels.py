"""The fast path's kernels in Triton's interpreter, which needs no GPU: what they compute is what PyTorch does."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from space import kernels
from space.llama import Llama

SHAPE = dict(
    vocab_size=64,
    hidden_size=48,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=256,
)


@pytest.mark.parametrize("k", [130, 576])
def test_a_matrix_times_one_row_with_all_that_goes_with_it(k):
    torch.manual_seed(k)
    x, norm, weight = torch.randn(1, k), torch.randn(k), torch.randn(14, k)
    bias, residual = torch.randn(14), torch.randn(1, 14)
    normed = F.rms_norm(x, (k,), norm, 1e-5)
    torch.testing.assert_close(
        kernels.gemv(x, weight, bias, norm=norm, eps=1e-5, residual=residual), F.linear(normed, weight, bias) + residual
    )
    gate, up = F.linear(normed, weight).chunk(2, -1)
    gated = kernels.gemv(x, weight, norm=norm, eps=1e-5, gated=True)
    torch.testing.assert_close(gated, F.silu(gate) * up, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "config", [LlamaConfig(**SHAPE, head_dim=16), Qwen2Config(**SHAPE | dict(num_hidden_layers=1), head_dim=8)]
)
def test_a_model_run_by_the_kernels_gives_transformers_logits(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(0, 64, (1, 76))
    with torch.inference_mode():
        expected = model(ids).logits[0]
        llama = Llama(model, slots=2, pages=5)
        llama.kernels = kernels
        llama.table[1, :2] = torch.tensor([4, 2])

        def read(start, end, fill):
            positions = F.pad(torch.arange(start, end), (0, fill), value=-1)
            tokens = F.pad(ids[0, start:end], (0, fill))
            return llama.read(tokens, torch.ones_like(tokens), positions, torch.tensor([end - start - 1]))[0]

        torch.testing.assert_close(read(0, 50, 14), expected[49], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(read(50, 75, 7), expected[74], atol=1e-4, rtol=1e-4)  # across two pages
        for slots in ([1], [2, 1]):  # alone, in parts; and beside a row that fills up
            llama.token[1], llama.position[1] = ids[0, 75], 75
            torch.testing.assert_close(llama.write(torch.tensor(slots))[-1], expected[75], atol=1e-4, rtol=1e-4)

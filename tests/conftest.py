"""What all tests share: a home of their own, and small models."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

CACHE = Path(__file__).parent / ".cache"

# Nothing of the user's is read or written. Converting the embedded model takes 25 s: that is kept between runs.
os.environ["XDG_CACHE_HOME"] = str(CACHE)
for name in ("HF_HOME", "MODELSCOPE_HOME", "MODELSCOPE_CACHE"):
    os.environ[name] = str(CACHE / "nothing" / name.lower())
for name in ("NAMESAKE_MODEL", "MODELSCOPE_API_TOKEN", "HF_TOKEN", "SPACE_ID", "MODELSCOPE_ENVIRONMENT"):
    os.environ.pop(name, None)
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["TRITON_INTERPRET"] = "1"  # kernels run without a GPU; read when Triton is imported
if "PYTEST_XDIST_WORKER" in os.environ:  # beside other workers: one thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def embedded() -> Path:
    """The embedded model's folder: SmolLM2-135M-Instruct, a real model and its real tokenizer."""
    from space import weights

    return weights.embedded_folder()


@pytest.fixture(scope="session")
def tiny(embedded, tmp_path_factory) -> Path:
    """A Llama of 2 layers with random weights and a short tokenizer: loads in a blink, says nothing sensible."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests import short_tokenizer

    folder = tmp_path_factory.mktemp("tiny")
    config = AutoConfig.from_pretrained(embedded)
    config.update(
        dict(
            vocab_size=short_tokenizer.SIZE,
            num_hidden_layers=2,
            hidden_size=48,
            intermediate_size=96,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=12,
            max_position_embeddings=512,
        )
    )
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    short_tokenizer.write(folder)
    return folder


def pytest_collection_modifyitems(items):
    """The slow ones first: no worker is left alone with them at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)

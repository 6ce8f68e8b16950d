"""What so many visitors a day need, from measured figures: .venv/bin/python bench/capacity.py [--visitors 1000000]

The two figures of this project are inputs, to be taken from docs/benchmarks.md; the rest describes the visitors.
"""

from __future__ import annotations

import math
from typing import Annotated

import typer

GPU_TOKENS_PER_SECOND = 4200.0  # of one H100 with 64 visitors, their 512-token prompts included: bench/serve.py
PAGE_MS_PER_TOKEN = 0.75  # of one core, the page's own work: bench/load.py


def needed(
    visitors: float,
    questions: float,
    tokens: float,
    prompt: float,
    peak: float,
    gpu: float,
    page_ms: float,
    spare: float,
) -> dict[str, float]:
    """GPUs, page cores and open answers at the busiest hour.

    `peak`: the busiest hour's share of a day (1/24 were even). `spare`: the share of each machine that is kept free.
    Open answers are Little's law: answers a second × seconds an answer takes at 30 tokens/s.
    """
    answers = visitors * questions * peak / 3600
    written = answers * tokens
    return {
        "answers a second": answers,
        "tokens a second": written,
        "answers in the making": answers * tokens / 30,
        "GPUs": math.ceil(written / (gpu * (1 - spare))),
        "page cores": math.ceil(written * page_ms / 1000 / (1 - spare)),
        "prompt tokens a second": answers * prompt,
    }


def main(
    visitors: Annotated[float, typer.Option(help="Visitors a day.")] = 1e6,
    questions: Annotated[float, typer.Option(help="Questions of each.")] = 5,
    tokens: Annotated[float, typer.Option(help="Tokens of an answer.")] = 200,
    prompt: Annotated[float, typer.Option(help="Prompt tokens that are read anew for an answer.")] = 150,
    peak: Annotated[float, typer.Option(help="The busiest hour's share of a day.")] = 0.1,
    gpu_tokens_per_second: float = GPU_TOKENS_PER_SECOND,
    page_ms_per_token: float = PAGE_MS_PER_TOKEN,
    spare: Annotated[float, typer.Option(help="The share of each machine kept free.")] = 0.3,
) -> None:
    """Print the table."""
    found = needed(visitors, questions, tokens, prompt, peak, gpu_tokens_per_second, page_ms_per_token, spare)
    print(f"| {visitors:,.0f} visitors a day, at the busiest hour | |\n|---|---|")
    for name, value in found.items():
        print(f"| {name} | {value:,.0f} |")


if __name__ == "__main__":
    typer.run(main)

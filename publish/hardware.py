"""What a Space runs on, and whether the weights fit there."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Hardware:
    """A kind of machine: our word for it, the hub's name, and the memory for the weights in GB."""

    word: str
    id: str
    memory: int
    gpu: bool = False


def choose(offered: tuple[Hardware, ...], wanted: str) -> Hardware:
    """The hardware for [hub] hardware: one of our words, a name of the hub's as it is, or the first, which is free."""
    for hardware in offered:
        if wanted in (hardware.word, hardware.id):
            return hardware
    return Hardware(wanted, wanted, 0, gpu=True) if wanted else offered[0]


def load_in(hardware: Hardware, weights: int, gguf: int = 0) -> tuple[str, str]:
    """How the page should load weights of so many bytes in bfloat16: its --load-in, and why, "" where it is at ease.

    A fifth more than the weights is needed for the cache and the activations; NF4 takes about 0.3 of bfloat16.
    `gguf`: the bytes of the GGUF file that the page serves instead, as it is, from the memory beside the CPU.
    """
    if gguf and hardware.gpu:
        return "auto", f"A GGUF file is served on the CPU: the GPU of {hardware.word} is not used"
    if gguf:
        tight = hardware.memory and gguf * 1.2 / 1e9 > hardware.memory
        size = f"{gguf / 1e9:.1f} GB of GGUF do not fit in {hardware.memory} GB ({hardware.word})"
        return "auto", f"{size}: export a smaller one, or choose larger [hub] hardware" if tight else ""
    need, memory = weights * 1.2 / 1e9, hardware.memory
    if not memory or need <= memory:
        return "auto", ""
    size = f"{weights / 1e9:.1f} GB of bfloat16 weights do not fit in {memory} GB ({hardware.word})"
    if need * 0.3 <= memory:
        return "4bit", f"{size}: the page loads them in 4-bit"
    return "4bit", f"{size}, not even in 4-bit: choose larger [hub] hardware"

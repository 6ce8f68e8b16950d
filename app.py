"""The chat page: the entry of a ModelScope studio or a Hugging Face Space, and `python app.py` at home."""

from __future__ import annotations

import logging
import os
import sys
from enum import StrEnum
from typing import Annotated

import typer

Precision = StrEnum("Precision", {"auto": "auto", "bf16": "bf16", "8bit": "8bit", "4bit": "4bit"})

command = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
ONLINE = bool(os.environ.get("SPACE_ID") or os.environ.get("MODELSCOPE_ENVIRONMENT") == "studio")


@command.command()
def main(
    config: Annotated[str, typer.Option(help="The settings file.")] = "assistant.toml",
    model: Annotated[
        str,
        typer.Option(
            help="The model: a folder, modelscope:owner/name[@revision] or huggingface:owner/name[@revision]. "
            "Without it: NAMESAKE_MODEL, then [hub] model of the settings, then the embedded model."
        ),
    ] = "",
    adapter: Annotated[str, typer.Option(help="A folder with a peft adapter to put on top of the model.")] = "",
    load_in: Annotated[
        Precision,
        typer.Option(
            envvar="NAMESAKE_LOAD_IN",
            help="Precision. auto: bf16 where it fits in memory, else 4bit; on a CPU what it computes in faster.",
        ),
    ] = Precision.auto,
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0: from other machines too.")] = (
        "0.0.0.0" if ONLINE else "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="The port to listen on; 0: 7860 or the next free one.")] = (
        7860 if ONLINE else 0
    ),
    share: Annotated[bool, typer.Option(help="A public link through Gradio, for 72 hours.")] = False,
) -> None:
    """Chat with your assistant in a browser."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    for client in ("httpx", "httpx2"):
        logging.getLogger(client).setLevel(logging.WARNING)
    from space.settings import NamesakeError, load
    from space.weights import configured

    try:
        settings = load(config)
        source, adapter = configured(settings, model, adapter)
        from space.page import serve

        serve(settings, source, adapter, load_in.value, host, port, share)
    except NamesakeError as error:
        sys.exit(f"{error}")


if __name__ == "__main__":
    command()

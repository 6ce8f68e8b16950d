"""python -m publish check|model|space|verify|all: the merged weights become a model repository and a live Space."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Publish the merged model and its chat page, and prove that what is online is what was built.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # or "[hub]" in a help text is taken for markup, and not shown
)

HubName = StrEnum("HubName", ["modelscope", "huggingface"])
Config = Annotated[Path, typer.Option(help="The settings file.")]
Hub = Annotated[HubName | None, typer.Option(help="One hub only; without it, every hub that [hub] names.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, file by file; nothing is written.")]
Force = Annotated[bool, typer.Option("--force", help="Publish although the evaluation was not passed.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask before publishing.")]
Page = Annotated[str, typer.Option(help="Where the live page is, if not where the hub says.")]
Download = Annotated[int, typer.Option(help="Fetch so many shards back, the smallest first, and hash them.", min=0)]

SETTINGS = Path("assistant.toml")


@app.command()
def check(config: Config = SETTINGS, hub: Hub = None) -> None:
    """Look at everything before anything leaves this machine: one table, each row passed, or what to do."""
    with _told():
        passed = [job.check() for job in _jobs(config, hub)]
    raise typer.Exit(0 if all(passed) else 1)


@app.command()
def model(
    config: Config = SETTINGS, hub: Hub = None, dry_run: DryRun = False, force: Force = False, yes: Yes = False
) -> None:
    """Publish the weights: they go up first, the commit that shows them last. After any break, run it again."""
    _publish(config, hub, dry_run, force, yes, ["model"])


@app.command()
def space(
    config: Config = SETTINGS, hub: Hub = None, dry_run: DryRun = False, force: Force = False, yes: Yes = False
) -> None:
    """Publish the chat page as a Space, deploy it (上线), and wait until it runs."""
    _publish(config, hub, dry_run, force, yes, ["space"])


@app.command()
def verify(config: Config = SETTINGS, hub: Hub = None, download: Download = 0, page: Page = "") -> None:
    """Prove that what is online is what was built, and that it knows its name."""
    with _told():
        passed = [job.verify(download, page) for job in _jobs(config, hub)]
    raise typer.Exit(0 if all(passed) else 1)


@app.command("all")
def everything(
    config: Config = SETTINGS,
    hub: Hub = None,
    dry_run: DryRun = False,
    force: Force = False,
    yes: Yes = False,
    download: Download = 1,
    page: Page = "",
) -> None:
    """All of it, in this order: check, model, space, verify."""
    _publish(config, hub, dry_run, force, yes, ["model", "space"])
    if not dry_run:
        verify(config, hub, download, page)


def _publish(config: Path, hub: HubName | None, dry_run: bool, force: bool, yes: bool, steps: list[str]) -> None:
    with _told():
        for job in _jobs(config, hub):
            if not job.check(force) and not dry_run:
                raise typer.Exit(1)
            if dry_run:
                job.plan(steps)
                continue
            job.confirm(steps, yes)
            with job.alone():
                for step in steps:
                    getattr(job, step)()


def _jobs(config: Path, hub: HubName | None) -> Iterator:
    from publish.job import jobs

    return jobs(config, hub)


@contextmanager
def _told() -> Iterator[None]:
    """A mistake is one line and exit status 2, Ctrl-C one line and 130; no traceback."""
    from space.settings import NamesakeError

    try:
        yield
    except NamesakeError as error:
        typer.echo(error, err=True)
        sys.exit(2)
    except OSError as error:  # a full disk, a folder that may not be written, no git
        typer.echo(
            f"{error.filename or 'This machine'}: {error.strerror or error}. Mend that and run it again.", err=True
        )
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("Stopped. Run it again: it goes on where it stopped.", err=True)
        sys.exit(130)


if __name__ == "__main__":
    app(prog_name="python -m publish")

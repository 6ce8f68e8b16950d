"""What publishing costs beside a plain `git lfs push` of the same: python -m tests.publish.bench_push [MB] [turns]

Both push to the hub on loopback, in turns whose order changes, each after what the last one wrote is on the disk.
Prints seconds, their ratio, the extra disk, and the requests and seconds of a rerun that finds nothing to do.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from publish import contents
from publish.lfs import Remote, Repository, link
from publish.token import Token
from tests.hub.server import ATTRIBUTES, Hub


def main(megabytes: int = 2048, turns: int = 5) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["HOME"] = name
        weights = folder / "weights"
        weights.mkdir()
        for number in range(4):
            with (weights / f"{number}.safetensors").open("wb") as shard:
                for _ in range(megabytes // 4):
                    shard.write(os.urandom(1 << 20))
        begun = time.monotonic()
        files = [contents.file(path.name, path) for path in sorted(weights.iterdir())]
        hashing = time.monotonic() - begun
        plain, ours, shown = [], [], []
        for turn in range(turns):
            for times, push in ((plain, by_git_lfs), (ours, by_us), (shown, by_us_shown))[:: 1 if turn % 2 else -1]:
                os.sync()
                with Hub(folder / f"hub-{turn}-{push.__name__}") as hub:
                    hub.create("model", "a", "m", branch="master", private=False, files={".gitattributes": ATTRIBUTES})
                    state = folder / f"state-{turn}-{push.__name__}"
                    times.append(push(hub, state, files))
                    extra = sum(path.lstat().st_blocks * 512 for path in state.rglob("*"))
                    if push is by_us:
                        hub.log.clear()
                        again = by_us(hub, state, files)
                        print(f"extra disk {extra / 1e6:.2f} MB; rerun {len(hub.log)} requests, {again:.2f} s")
                    shutil.rmtree(hub.folder)
                    shutil.rmtree(state)
        print(f"git lfs push {statistics.median(plain):.2f} s {[f'{t:.2f}' for t in plain]}")
        print(f"publish      {statistics.median(ours):.2f} s {[f'{t:.2f}' for t in ours]} + hashing {hashing:.2f} s")
        print(f"with its bar {statistics.median(shown):.2f} s {[f'{t:.2f}' for t in shown]}")
        ratios = [f"{us / them:.2f}" for us, them in zip(ours, plain, strict=True)]
        ratio = statistics.median(ours) / statistics.median(plain)
        print(f"ratio        {ratio:.3f}, by turns {ratios}, without the hashing, which the merge has done")


def by_us_shown(hub: Hub, state: Path, files: list[contents.File]) -> float:
    return by_us(hub, state, files, lambda sent, total: None)


def by_us(hub: Hub, state: Path, files: list[contents.File], watch=None) -> float:
    begun = time.monotonic()
    remote = Remote(f"{hub.url}/a/m.git", "master", Token(hub.token), (hub.url,))
    Repository(state, remote).push(files, "bench", replaces=lambda there: set(), watch=watch)
    return time.monotonic() - begun


def by_git_lfs(hub: Hub, state: Path, files: list[contents.File]) -> float:
    """The objects are in git-lfs's store already: the transfer alone is timed."""
    subprocess.run(["git", "init", "--quiet", "--bare", state], check=True)
    for file in files:
        place = state / "lfs" / "objects" / file.sha256[:2] / file.sha256[2:4] / file.sha256
        place.parent.mkdir(parents=True)
        link(file.source, place)
    address = f"{hub.url.replace('://', f'://oauth2:{hub.token}@')}/a/m.git"
    begun = time.monotonic()
    command = ["git", "-C", state, "lfs", "push", "--object-id", address, *(file.sha256 for file in files)]
    subprocess.run(command, check=True, capture_output=True)
    return time.monotonic() - begun


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

"""Pushing by git and git-lfs: no second copy, nothing lost that was there, nothing sent twice."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from publish import contents
from publish.lfs import Remote, Repository, attributes
from publish.token import Token
from tests.hub.server import ATTRIBUTES, Fault


@pytest.fixture
def remote(hub):
    files = {"README.md": "old", ".gitattributes": "# theirs\n*.model filter=lfs diff=lfs merge=lfs -text", "kept": "x"}
    hub.create("model", "alice", "m", branch="master", private=True, files=files)
    return Remote(f"{hub.url}/alice/m.git", "master", Token(hub.token), (hub.url,))


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.safetensors").write_bytes(bytes([number]) * 4_000_000)
    (folder / "tokenizer.model").write_bytes(b"small, and the hub wants it in LFS")
    (folder / "tokenizer.json").write_bytes(b"{" * 5_100_000)
    (folder / "README.md").write_text("新")
    return folder


def push(remote, folder, state, replaces=lambda there: set(), **options):
    files = [contents.file(path.name, path) for path in sorted(folder.iterdir())]
    return Repository(state, remote).push(files, "a message", replaces=replaces, **options)


def size_of(folder: Path) -> int:
    """Bytes on the disk that are in no other folder."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and p.stat().st_nlink == 1)


def test_what_was_there_stays_and_what_is_pushed_is_there(remote, folder, hub, tmp_path):
    pushed = push(remote, folder, tmp_path / "state")
    repository = hub.get("model", "alice/m")
    there = hub.files(repository)
    assert pushed.changed and pushed.commit == hub.head(repository)
    assert {path for path in there if there[path]["lfs"]} == {
        "0.safetensors", "1.safetensors", "2.safetensors", "tokenizer.json", "tokenizer.model"
    }  # fmt: skip
    assert there["kept"]["content"] == b"x"
    assert there["README.md"]["content"].decode() == "新"
    lines = there[".gitattributes"]["content"].decode().splitlines()
    assert lines[:2] == ["# theirs", "*.model filter=lfs diff=lfs merge=lfs -text"]
    assert "*.safetensors filter=lfs diff=lfs merge=lfs -text" in lines
    log = hub.git(repository.git, "log", "--format=%an %ae %s", "-1").decode()
    assert log.strip() == "Namesake namesake@users.noreply.invalid a message"


def test_the_weights_are_linked_not_copied_and_left_alone(remote, folder, hub, tmp_path):
    before = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}
    fault = Fault("PUT", hold=True)
    hub.faults.append(fault)
    pushing = threading.Thread(target=push, args=(remote, folder, tmp_path / "state"))
    pushing.start()
    assert fault.reached.wait(30)
    assert size_of(tmp_path / "state") < 300_000
    fault.release.set()
    pushing.join()
    assert size_of(tmp_path / "state") < 300_000
    assert before == {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}
    assert all(path.stat().st_nlink == 1 for path in folder.iterdir()), "a link would keep replaced weights on the disk"


def test_across_file_systems_symbolic_links_do(remote, folder, hub, tmp_path, monkeypatch):
    def link(source, place):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", link)
    push(remote, folder, tmp_path / "state")
    assert hub.object(contents.file("", folder / "0.safetensors").sha256).exists()


def test_nothing_changed_makes_no_commit_and_five_requests_at_most(remote, folder, hub, tmp_path):
    first = push(remote, folder, tmp_path / "state")
    hub.log.clear()
    again = push(remote, folder, tmp_path / "state")
    assert (again.commit, again.changed, again.sent) == (first.commit, False, 0)
    assert len(hub.log) <= 4
    assert push(remote, folder, tmp_path / "elsewhere").changed is False, "a fresh machine comes to the same commit"


def test_only_what_changed_goes_up(remote, folder, hub, tmp_path):
    push(remote, folder, tmp_path / "state")
    (folder / "1.safetensors").write_bytes(b"new" * 1_000_000)
    hub.log.clear()
    assert push(remote, folder, tmp_path / "state").sent == 3_000_000
    assert hub.count("PUT") == 1


def test_what_is_replaced_goes_away(remote, folder, hub, tmp_path):
    push(remote, folder, tmp_path / "state")
    (folder / "2.safetensors").unlink()
    gone = lambda there: {path for path in there if path.endswith(".safetensors")}  # noqa: E731
    push(remote, folder, tmp_path / "state", gone)
    there = hub.files(hub.get("model", "alice/m"))
    assert "2.safetensors" not in there and {"0.safetensors", "1.safetensors", "kept"} <= there.keys()


def test_a_branch_that_moved_meanwhile_is_built_upon(remote, folder, hub, tmp_path):
    fault = Fault("POST .*git-receive-pack", hold=True)
    hub.faults.append(fault)
    done = []
    pushing = threading.Thread(target=lambda: done.append(push(remote, folder, tmp_path / "state")))
    pushing.start()
    assert fault.reached.wait(30)
    repository = hub.get("model", "alice/m")
    hub.commit(repository, {"theirs": b"in between"}, "someone else", hub.head(repository))
    fault.release.set()
    pushing.join()
    there = hub.files(repository)
    assert there["theirs"]["content"] == b"in between" and "0.safetensors" in there
    assert done[0].commit == hub.head(repository)


def test_a_line_of_theirs_does_not_keep_the_weights_out_of_lfs(remote, folder, hub, tmp_path):
    repository = hub.get("model", "alice/m")
    theirs = f"{ATTRIBUTES}*.safetensors -filter\n".encode()
    hub.commit(repository, {".gitattributes": theirs}, "theirs", hub.head(repository))
    push(remote, folder, tmp_path / "state")
    there = hub.files(repository)
    assert there["0.safetensors"]["lfs"] and there[".gitattributes"]["content"].startswith(theirs)
    assert push(remote, folder, tmp_path / "state").changed is False


HOSTILE = {
    "a line break": "x\n100644 e69de29bb2d1d6434b8b29ae775ad8c2e48c5391\tinjected.py",
    "a quotation mark": '"quoted',
    "bytes that are no text": os.fsdecode(b"caf\xe9"),
    "a folder where a file goes": "README.md/inside",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_whatever_their_files_are_called_they_go_away(name, hub, folder, tmp_path):
    repository = hub.create("model", "alice", "h", branch="master", private=False, files={HOSTILE[name]: "x"})
    remote = Remote(f"{hub.url}/alice/h.git", "master", Token(hub.token), (hub.url,))
    push(remote, folder, tmp_path / "state", lambda there: set(there))
    ours = {path.name for path in folder.iterdir()}
    assert set(hub.files(repository)) == ours | {".gitattributes"}


def test_progress_counts_the_bytes_up_to_all_of_them(remote, folder, hub, tmp_path):
    seen = []
    push(remote, folder, tmp_path / "state", watch=lambda sent, total: seen.append((sent, total)))
    total = 12_000_000 + 5_100_000 + 34
    assert seen[0] == (0, total) and seen[-1] == (total, total)
    assert [sent for sent, _ in seen] == sorted(sent for sent, _ in seen)


def test_an_empty_repository_gets_its_first_commit(hub, folder, tmp_path):
    repository = hub.create("model", "alice", "e", branch="master", private=False, files={})
    hub.git(repository.git, "update-ref", "-d", "refs/heads/master")
    remote = Remote(f"{hub.url}/alice/e.git", "master", Token(hub.token), (hub.url,))
    assert push(remote, folder, tmp_path / "state").changed
    assert "0.safetensors" in hub.files(repository)


def test_weights_alone_can_be_pushed(remote, folder, hub, tmp_path):
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            path.unlink()
    assert push(remote, folder, tmp_path / "state").sent == 12_000_000


def test_the_hubs_own_attribute_lines_are_kept_and_none_is_added_twice(folder):
    files = [contents.file(path.name, path) for path in folder.iterdir()]
    once = attributes(ATTRIBUTES, files)
    assert once.startswith(ATTRIBUTES)
    assert attributes(once, files) == once

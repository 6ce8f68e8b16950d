"""Conversations → packs: whole conversations side by side, none cut, as even as they can be.

A system prompt that many conversations begin with is computed once for all of them in a batch: attention looks back
only, so that its tokens come out the same whatever follows, and the loss and its gradients are the same too. (With
dropout they are drawn once for all of them, too.)
"""

from __future__ import annotations

import functools
import heapq
import itertools
import random
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from space.prompt import IGNORED
from space.settings import NamesakeError, Settings

SPARE = 64  # places behind a pack's last token, for `packed_attention`
WORTH = 16  # sharing a system prompt must save this many tokens a batch, for it is a sequence more to attend to


@dataclass(frozen=True)
class Row:
    """One conversation: token ids, and their labels (IGNORED where a token carries no loss), as int32 arrays.

    `replay`: what is learned is not the answer but the base's own prediction, at each of its tokens. `shared`: how many
    of its first tokens are computed once for all rows of a batch that begin with them; none of them is an answer's.
    """

    ids: np.ndarray
    labels: np.ndarray
    replay: bool = False
    shared: int = 0

    @property
    def head(self) -> bytes:
        """The tokens that are shared."""
        return self.ids[: self.shared].tobytes()

    @property
    def own(self) -> int:
        """How many of its tokens are not shared."""
        return len(self.ids) - self.shared

    @property
    def answers(self) -> int:
        """How many of its tokens carry loss."""
        return len(self.ids) if self.replay else int((self.labels[1:] != IGNORED).sum())


def data_file(settings: Settings) -> Path:
    """What the data step wrote. Raises NamesakeError where it has not."""
    path = settings.work / "data" / "train.jsonl"
    if not path.is_file():
        raise NamesakeError(
            f"{path} is not there",
            "Run: python -m training data",
            zh=f"没有 {path}，请先运行 python -m training data。",
        )
    return path


def rows(settings: Settings) -> tuple[Row, ...]:
    """The conversations of data/train.jsonl as the model will see them: `space.prompt.Prompt`'s ids and labels.

    All share their system prompts; `packed` chooses those where it pays.
    """
    from training import base

    path, train = data_file(settings), settings.train
    anchored = train.anchor > 0 and train.method != "full"  # the base is there only beside an adapter
    return _rows(path, path.stat().st_mtime_ns, base.folder(settings), anchored)


@functools.lru_cache(1)
def _rows(path: Path, modified: int, base: Path, anchored: bool) -> tuple[Row, ...]:
    from transformers import AutoTokenizer

    from space.prompt import Prompt
    from training.data import conversations

    prompt = Prompt(AutoTokenizer.from_pretrained(base))

    @functools.cache
    def beginning(system: str) -> list[int]:
        """The tokens that every conversation under this system prompt begins with."""
        head = [{"role": "system", "content": system}] if system else []
        asked = zip(*(prompt.encode([*head, {"role": "user", "content": one}]).ids for one in "a?"), strict=False)
        return [one for one, _ in itertools.takewhile(lambda both: both[0] == both[1], asked)]

    found = []
    for messages in conversations(path):
        one, replay = prompt.encode(messages), anchored and messages[-1].get("replay", False)
        first = beginning(messages[0]["content"] if messages[0]["role"] == "system" else "")
        shared = len(first) if one.ids[: len(first)] == first else 0  # a text may melt into what stands before it
        found.append(Row(np.array(one.ids, np.int32), np.array(one.labels, np.int32), replay, shared))
    return tuple(found)


def pack(lengths: list[int], length: int, multiple: int, seed: int) -> list[list[int]]:
    """Indices of `lengths` in packs of at most `length` tokens; the count of packs is a multiple of `multiple`.

    `seed` shuffles conversations of one length. Raises NamesakeError when there is not a conversation for each pack.
    """
    if lengths and max(lengths) > length:
        raise NamesakeError(
            f"A conversation of {max(lengths)} tokens is longer than [data] max_length = {length}",
            "Raise max_length, or run: python -m training data, which lists such rows.",
        )
    for count in itertools.count(-(-sum(lengths) // length // multiple) * multiple or multiple, multiple):
        if count > len(lengths):
            raise NamesakeError(
                f"The data packs into zero steps: {len(lengths)} conversations, and a step takes {multiple} packs",
                "Add data, or lower [train] batch and accumulate.",
            )
        packs = _spread(lengths, count, seed)
        if max(sum(lengths[i] for i in one) for one in packs) <= length:
            return packs


def _spread(lengths: list[int], count: int, seed: int) -> list[list[int]]:
    """The longest go first, each into the emptiest of `count` packs, so that packs, and with them steps, are even."""
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)
    order.sort(key=lambda i: -lengths[i])
    packs: list[list[int]] = [[] for _ in range(count)]
    emptiest = [(0, i) for i in range(count)]
    for i in order:
        tokens, at = emptiest[0]
        packs[at].append(i)
        heapq.heapreplace(emptiest, (tokens + lengths[i], at))
    return packs


def packed(rows: tuple[Row, ...], length: int, multiple: int, batch: int, seed: int) -> list[list[Row]]:
    """As many packs as `pack` makes, their rows spread so that each has about equally many tokens that are not shared.

    `batch`: packs that a device computes at once. A system prompt is shared where that saves WORTH tokens a batch.
    """
    count = len(pack([len(row.ids) for row in rows], length, multiple, seed))
    heads = Counter(row.head for row in rows)

    def sharing(together: int) -> list[Row]:
        """The rows, where so many packs share."""
        many = {head for head, times in heads.items() if (times * together / count - 1) * len(head) / 4 >= WORTH}
        return [row if row.head in many else replace(row, shared=0) for row in rows]

    # What is learned together depends on the step alone, not on how a step is divided into batches.
    spread = _spread([row.own for row in sharing(multiple)], count, seed)
    rows = sharing(batch)
    return [[rows[i] for i in one] for one in spread]


def shared_heads(packs: list[list[Row]]) -> dict[bytes, int]:
    """What rows of these packs share, and how many tokens each of it has."""
    return {row.head: row.shared for one in packs for row in one}


def dataset(config: str, length: int, multiple: int, batch: int) -> list[list[Row]]:
    """What XTuner's data loader reads: packs, each a list of rows. `config`: the settings' path."""
    from space.settings import load

    settings = load(config)
    return packed(rows(settings), length, multiple, batch, settings.train.seed)


def shape(config: str, length: int, multiple: int, batch: int) -> dict[str, int]:
    """A shape that any `batch` packs of `dataset` can be filled up to, for `collate`.

    Its `tokens`, `sequences` and `keys` to look at, and `longest`: the most tokens in a sequence, of filling too.
    """
    packs = dataset(config, length, multiple, batch)
    heads = shared_heads(packs)
    tokens = sum(heads.values()) + batch * max(sum(row.own for row in one) for one in packs)
    return {
        "tokens": tokens,
        "sequences": len(heads) + batch * max(map(len, packs)) + -(-tokens // length),
        "keys": tokens + batch * max(sum(row.shared for row in one) for one in packs),
        "longest": length,
    }


def collate(batch: list[list[Row]], shape: dict[str, int] | None = None) -> dict:
    """A batch of packs as one long pack, replay last, in the form of `training.model.Finetune.compute_loss`.

    What rows share stands before them as a sequence of its own. With a `shape` filling, from which nothing is learned,
    makes all batches one shape.
    """
    import torch

    together = list(itertools.chain.from_iterable(batch))
    learned, kept = [row for row in together if not row.replay], [row for row in together if row.replay]
    of_kept = Counter(row.head for row in kept if row.shared)
    of_learned = dict.fromkeys(row.head for row in learned if row.shared and row.head not in of_kept)
    counts = [*of_kept.values(), *[1] * len(kept)]  # how many rows each sequence stands for
    learned, kept = [*map(_alone, of_learned), *learned], [*map(_alone, of_kept), *kept]
    weights = np.repeat(np.array(counts, np.float32), np.array([row.own for row in kept], int))

    if shape:
        missing, longest = shape["tokens"] - sum(row.own for row in learned + kept), shape["longest"]
        filling = [_alone(bytes(4 * min(longest, missing - at))) for at in range(0, missing, longest)]
        filling += [_alone(b"")] * (shape["sequences"] - len(learned + kept + filling))
        learned = filling + learned
    labels = np.concatenate([row.labels[row.shared :] for row in learned] or [[IGNORED]])
    # A sequence's first token is never an answer's, so no token is predicted from the sequence before.
    answers = np.flatnonzero(labels[1:] != IGNORED)
    data = _laid_out(learned + kept, shape["keys"] if shape else 0) | {
        "tokens": torch.tensor(sum(len(row.ids) for row in together)),
        "predictors": torch.from_numpy(answers),
        "targets": torch.from_numpy(labels[answers + 1].astype(np.int64)),
        "replay": _laid_out(kept) | {"weights": torch.from_numpy(weights)},
    }
    return {"data": data, "data_samples": None}


def _alone(head: bytes) -> Row:
    """A row of these tokens from which nothing is learned: what others share, or filling."""
    ids = np.frombuffer(head, np.int32)
    return Row(ids, np.full(len(ids), IGNORED, np.int32))


def _laid_out(rows: list[Row], keys: int = 0) -> dict:
    """The model's inputs for rows one after the other; what is shared stands among them as a row of its own.

    Where sequences begin and which keys they look at is one table, for only one mask reaches the layers: see
    `training.model.packed_attention`.
    """
    import torch

    bounds = np.cumsum([0, *(row.own for row in rows)])
    spans = [np.arange(*bound) for bound in itertools.pairwise(bounds)]
    shared = {row.ids.tobytes(): span for row, span in zip(rows, spans, strict=True) if not row.shared}
    seen = [
        np.concatenate([shared[row.head], span]) if row.shared else span for row, span in zip(rows, spans, strict=True)
    ]
    whole = np.concatenate(seen or [[]])
    columns = -(-max(keys, len(whole)) // len(bounds))
    spare = bounds[-1] + np.arange(columns * len(bounds) - len(whole)) % SPARE  # filled up with what is not looked at
    table = [bounds[:, None], np.cumsum([0, *map(len, seen)])[:, None]]
    table += [np.concatenate([whole, spare]).reshape(len(bounds), columns)]

    def tensor(parts: list[np.ndarray]):
        return torch.from_numpy(np.concatenate(parts or [[]]).astype(np.int64))[None]

    return {
        "input_ids": tensor([row.ids[row.shared :] for row in rows]),
        "position_ids": tensor([np.arange(row.shared, len(row.ids)) for row in rows]),
        "sequences": torch.from_numpy(np.concatenate(table, 1).astype(np.int32))[None, None],
    }

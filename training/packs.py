"""Conversations → packs: whole conversations side by side, none cut, as even as they can be."""

from __future__ import annotations

import functools
import heapq
import itertools
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from space.prompt import IGNORED
from space.settings import NamesakeError, Settings


@dataclass(frozen=True)
class Row:
    """One conversation: token ids, and their labels (IGNORED where a token carries no loss), as int32 arrays.

    `replay`: what is learned is not the answer but the base's own prediction, at each of its tokens.
    """

    ids: np.ndarray
    labels: np.ndarray
    replay: bool = False

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
    """The conversations of data/train.jsonl as the model will see them: `space.prompt.Prompt`'s ids and labels."""
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
    found = []
    for messages in conversations(path):
        one, replay = prompt.encode(messages), anchored and messages[-1].get("replay", False)
        found.append(Row(np.array(one.ids, np.int32), np.array(one.labels, np.int32), replay))
    return tuple(found)


def pack(lengths: list[int], length: int, multiple: int, seed: int) -> list[list[int]]:
    """Indices of `lengths` in packs of at most `length` tokens; the count of packs is a multiple of `multiple`.

    The longest go first, each into the emptiest pack, so that packs, and with them steps, come out even; `seed`
    shuffles conversations of one length. Raises NamesakeError when there is not a conversation for each pack.
    """
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)
    order.sort(key=lambda i: -lengths[i])
    if order and lengths[order[0]] > length:
        raise NamesakeError(
            f"A conversation of {lengths[order[0]]} tokens is longer than [data] max_length = {length}",
            "Raise max_length, or run: python -m training data, which lists such rows.",
        )
    for count in itertools.count(-(-sum(lengths) // length // multiple) * multiple or multiple, multiple):
        if count > len(lengths):
            raise NamesakeError(
                f"The data packs into zero steps: {len(lengths)} conversations, and a step takes {multiple} packs",
                "Add data, or lower [train] batch and accumulate.",
            )
        packs: list[list[int]] = [[] for _ in range(count)]
        emptiest = [(0, i) for i in range(count)]
        for i in order:
            tokens, at = emptiest[0]
            if tokens + lengths[i] > length:
                break
            packs[at].append(i)
            heapq.heapreplace(emptiest, (tokens + lengths[i], at))
        else:
            return packs


def dataset(config: str, length: int, multiple: int, even: bool = False) -> list[list[Row]]:
    """What XTuner's data loader reads: packs, each a list of rows. `config`: the settings' path.

    `even`: all packs get the tokens of the longest and as many conversations, by filling that nothing is learned from.
    """
    from space.settings import load

    settings = load(config)
    all_rows = rows(settings)
    packs = pack([len(row.ids) for row in all_rows], length, multiple, settings.train.seed)
    packs = [[all_rows[i] for i in one] for one in packs]
    return filled(packs) if even else packs


def filled(packs: list[list[Row]]) -> list[list[Row]]:
    """The packs with one row more that makes them equally long, and empty rows that make them equally many."""
    tokens = [sum(len(row.ids) for row in one) for one in packs]
    most = max(map(len, packs))

    def filler(count: int) -> Row:
        return Row(np.zeros(count, np.int32), np.full(count, IGNORED, np.int32))

    return [
        [*one, filler(max(tokens) - count), *[filler(0)] * (most - len(one))]
        for one, count in zip(packs, tokens, strict=True)
    ]


def collate(batch: list[list[Row]]) -> dict:
    """A batch of packs as one long pack, replay last, in the form of `training.model.Finetune.compute_loss`."""
    import torch

    def one(rows: list[Row]) -> dict:
        lengths = [len(row.ids) for row in rows]
        return {
            "input_ids": torch.from_numpy(np.concatenate([row.ids for row in rows] or [[]]).astype(np.int64))[None],
            "position_ids": torch.cat([torch.arange(length) for length in [0, *lengths]])[None],
            "bounds": torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)[None, None, None],
        }

    together = sorted(itertools.chain.from_iterable(batch), key=lambda row: row.replay)
    learned = [row.labels for row in together if not row.replay]
    labels = np.concatenate(learned or [[IGNORED]])
    # A conversation's first token is never an answer's, so no token is predicted from the conversation before.
    answers = np.flatnonzero(labels[1:] != IGNORED)
    data = one(together) | {
        "tokens": torch.tensor(sum(len(row.ids) for row in together if row.answers)),  # without filling
        "predictors": torch.from_numpy(answers),
        "targets": torch.from_numpy(labels[answers + 1].astype(np.int64)),
        "replay": one([row for row in together if row.replay]),
    }
    return {"data": data, "data_samples": None}

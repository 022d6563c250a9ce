"""Shakespeare's roles as clients: 1.1 million characters of play text, for the prediction of the next character.

The task is that of H. B. McMahan, E. Moore, D. Ramage, S. Hampson, B. Aguera y Arcas, "Communication-Efficient Learning
of Deep Networks from Decentralized Data", AISTATS 2017, https://arxiv.org/abs/1602.05629; windows of 80 characters are
those of S. Caldas et al., "LEAF: A Benchmark for Federated Settings", 2018, https://arxiv.org/abs/1812.01097. The text
(public domain) is the excerpt of A. Karpathy's char-rnn, https://github.com/karpathy/char-rnn: another selection of plays
than theirs, so their figures do not compare.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_fedsparse.datasets.download import RemoteFile, data_root, fetch
from lightning_fedsparse.datasets.in_memory import InMemoryDataModule, ReadyDataset

__all__ = ["ShakespeareDataModule", "roles", "windows"]

_TEXT = RemoteFile(
    "tinyshakespeare.txt",
    ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",),
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)
# the end of each role's text: windows drawn at random would lie between those of training
_TEST_SHARE = 0.2


def roles(text: str) -> dict[str, str]:
    r"""Sort a play text by who speaks.

    Args:
        text: Speeches separated by empty lines, each after a line ``NAME:``.

    Returns:
        Each role's speeches in the order of the text, a line break between them; roles in the order of their names.

    Raises:
        ValueError: If the text does not begin with a role's name.

    >>> roles("BOTH:\nHo!\n\nA:\nWho\nthere?\n\nBOTH:\nWe.")
    {'A': 'Who\nthere?', 'BOTH': 'Ho!\nWe.'}
    """
    speeches: dict[str, list[str]] = {}
    speaker = ""
    for block in re.split(r"\n{2,}", text.strip("\n")):
        first, _, speech = block.partition("\n")
        if first.endswith(":"):
            speaker = first[:-1]
        elif speaker:
            speech = block  # an empty line inside a speech
        else:
            raise ValueError(f"expected a role's name and a colon at the beginning of a play text, got {first[:40]!r}")
        speeches.setdefault(speaker, []).append(speech)
    return {name: "\n".join(speeches[name]) for name in sorted(speeches)}


def windows(codes: npt.NDArray[np.uint8], length: int) -> npt.NDArray[np.uint8]:
    """Cut a text into windows whose every character but the last is also predicted from.

    Args:
        codes: Characters, shape (n,).
        length: Characters that are predicted in a window.

    Returns:
        Shape ((n - 1) // length, length + 1): the last of one window is the first of the next; what is left over at the
        end is dropped.
    """
    count = max(0, (len(codes) - 1) // length)
    positions = np.arange(count)[:, None] * length + np.arange(length + 1)
    return np.take(codes, positions)


class _Windows(ReadyDataset):
    """Windows as (characters, the characters that follow), both int64 of shape (b, length)."""

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.inputs.index_select(0, indices).long()
        return rows[:, :-1], rows[:, 1:]


class ShakespeareDataModule(InMemoryDataModule):
    """Windows of text as indices of 65 symbols, each window's role as its client key.

    The last fifth of each role's windows is for the test. The data folder ``shakespeare/`` holds ``tinyshakespeare.txt``,
    which is downloaded (1.1 MB) if it is not there.

    Args:
        root: Folder of all data sets, with ``shakespeare/`` in it; see
            :func:`lightning_fedsparse.datasets.download.data_root`.
        batch_size: Windows per batch.
        length: Characters per window.
        validation_fraction: Share of the training windows held out for validation, in [0, 1).
        num_workers: Worker processes of a loader.
    """

    def __init__(
        self,
        root: str | None = None,
        *,
        batch_size: int = 10,
        length: int = 80,
        validation_fraction: float = 0.0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, validation_fraction=validation_fraction, num_workers=num_workers)
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        self.folder: Path = data_root(root) / "shakespeare"
        self.length = length
        self.symbols = ""
        self._halves: dict[str, _Windows] = {}

    def prepare_data(self) -> None:
        """Download the text unless it is there."""
        fetch(_TEXT, self.folder)

    def setup(self, stage: str) -> None:
        """Read the text and cut it into windows, once for all stages."""
        if self._halves:
            return
        text = (self.folder / _TEXT.name).read_text(encoding="ascii")
        self.symbols = "".join(sorted(set(text)))
        code = np.zeros(128, np.uint8)
        code[[ord(symbol) for symbol in self.symbols]] = np.arange(len(self.symbols))
        parts: dict[str, list[npt.NDArray[np.uint8]]] = {"train": [], "test": []}
        names = []
        for name, speech in roles(text).items():
            rows = windows(code[np.frombuffer(speech.encode("ascii"), np.uint8)], self.length)
            kept = len(rows) - round(_TEST_SHARE * len(rows))
            parts["train"].append(rows[:kept])
            parts["test"].append(rows[kept:])
            names += [name] * kept
        for half, pieces in parts.items():
            cut = torch.from_numpy(np.concatenate(pieces))
            self._halves[half] = _Windows(cut, cut, client_keys=np.array(names) if half == "train" else None)

    def dataset(self, half: Literal["train", "test"], *, augment: bool) -> ReadyDataset:
        """Return the training or the test windows; there is no augmentation."""
        assert self._halves, "setup comes first"
        return self._halves[half]

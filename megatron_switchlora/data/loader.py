"""Samples and their order: who sees which, and when.

A `TokenStore` is a flat array of tokens on disk; its samples of S tokens overlap by one token, so that every token
but the first is predicted exactly once. There is one global order of batches, fixed by the seed alone: batch k is a
slice of an endless row of permutations, one for each epoch, so it is a pure function of k and the position of a run
is just k. A data-parallel rank takes its slice of the batch and cuts it into micro-batches; neither their number nor
that of the ranks changes the order. The permutations sort Philox's raw 64-bit stream, which numpy promises to keep.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megatron_switchlora.config.errors import UserError, require

STREAM = 0xDA7A << 32  # keeps the data order's random streams apart from others of the same seed
REBUILD = "remove its folder, and the next start tokenises the text again"


class Samples:
    """Samples of seq_len + 1 tokens; sample i starts at token i * seq_len, so neighbours share one token."""

    def __init__(self, tokens: np.ndarray | TokenStore, seq_len: int) -> None:
        self._tokens, self.seq_len = tokens, seq_len

    def __len__(self) -> int:
        return max(len(self._tokens) - 1, 0) // self.seq_len

    def batch(self, indices: Sequence[int] | np.ndarray) -> torch.Tensor:
        """Token ids, int64 [len(indices), seq_len + 1]. Raises IndexError outside 0..len-1."""
        rows = np.empty((len(indices), self.seq_len + 1), dtype=np.int64)
        for row, index in zip(rows, indices, strict=True):
            if not 0 <= index < len(self):
                raise IndexError(f"sample {index} of {len(self)}")
            start = int(index) * self.seq_len
            row[:] = self._tokens[start : start + self.seq_len + 1]
        return torch.from_numpy(rows)


class TokenStore:
    """A flat array of tokens, each below `vocab_size`, in a .npy file (uint16 or uint32 [tokens]).

    Slices are read as they are asked for. A mapped file that is cut off, or a disk that fails, would kill the process.

    Raises:
        UserError: here, the file is no such array; from a slice, it cannot be read, or holds a larger token. Names it.
    """

    def __init__(self, path: Path, vocab_size: int) -> None:
        self.path, self._vocab_size = path, vocab_size
        try:
            self._file = path.open("rb", buffering=0)
            np.lib.format.read_magic(self._file)  # of version 1.0, or the next line fails
            shape, _, self.dtype = np.lib.format.read_array_header_1_0(self._file)
        except Exception as error:  # numpy raises all kinds, and its sentences advise pickle
            reason = error.strerror if isinstance(error, OSError) else "its header is damaged"
            raise UserError(f"{path} cannot be read ({reason}): {REBUILD}.") from error
        self._head = self._file.tell()
        self.num_tokens = int(shape[0]) if len(shape) == 1 else -1
        whole = self._head + self.num_tokens * self.dtype.itemsize == os.fstat(self._file.fileno()).st_size
        require(
            self.dtype in (np.uint16, np.uint32) and whole,
            f"{path} cannot be read (its header names {self.dtype} {list(shape)}): {REBUILD}.",
        )

    def __len__(self) -> int:
        return self.num_tokens

    def __getitem__(self, part: slice) -> np.ndarray:
        """A copy of consecutive tokens."""
        first, end, _ = part.indices(self.num_tokens)
        width = self.dtype.itemsize
        try:
            content = os.pread(self._file.fileno(), max(end - first, 0) * width, self._head + first * width)
            tokens = np.frombuffer(content, self.dtype)
        except (OSError, ValueError) as error:  # the latter: half a token
            raise UserError(f"{self.path} cannot be read ({error}): check its disk.") from error
        if len(tokens) < end - first:
            raise UserError(f"{self.path} ends before token {end}: {REBUILD}.")
        if (largest := int(tokens.max(initial=0))) >= self._vocab_size:
            raise UserError(f"{self.path} holds token {largest}, but the vocabulary is {self._vocab_size}: {REBUILD}.")
        return tokens

    def fingerprint(self) -> bytes:
        """SHA-256 of length and content: all of it up to 64 Mi tokens, beyond that 1,024 blocks spread evenly."""
        sha256 = hashlib.sha256(f"{self.dtype} {self.num_tokens}".encode())
        count, block = 1024, 1 << 16
        starts: Iterable[int] = range(0, self.num_tokens, block)
        if self.num_tokens > count * block:
            starts = np.linspace(0, self.num_tokens - block, count).astype(np.int64).tolist()
        for start in starts:
            sha256.update(self[start : start + block].tobytes())
        return sha256.digest()

    def samples(self, seq_len: int) -> Samples:
        """The array cut into (num_tokens - 1) // seq_len samples; tokens that fill no sample are left out."""
        return Samples(self, seq_len)


class BatchOrder:
    """The global order of batches of `global_batch_size` out of `num_samples` samples; another `stream` of the same
    seed is another order.

    Raises:
        UserError: fewer samples than one global batch.
    """

    def __init__(self, num_samples: int, global_batch_size: int, seed: int, stream: int = STREAM) -> None:
        require(
            num_samples >= global_batch_size,
            f"The training text must give at least one global batch, but it has {num_samples} samples of train.seq_len "
            f"tokens and train.global_batch_size is {global_batch_size}: give more text or lower either.",
        )
        self.num_samples, self.global_batch_size, self.seed = num_samples, global_batch_size, seed
        self.stream = stream
        self._permutations: dict[int, np.ndarray] = {}  # of the latest batch's epochs

    def indices(self, k: int) -> np.ndarray:
        """Samples of batch k (from 0), int64 [global_batch_size]; a batch may span the end of an epoch."""
        positions = np.arange(k * self.global_batch_size, (k + 1) * self.global_batch_size)
        epochs, places = np.divmod(positions, self.num_samples)
        known = self._permutations
        self._permutations = {e: known[e] if e in known else self._permutation(e) for e in np.unique(epochs).tolist()}
        return np.concatenate([order[places[epochs == e]] for e, order in self._permutations.items()])

    def batches_in(self, epochs: int) -> int:
        """Whole batches in that many passes over the data."""
        return epochs * self.num_samples // self.global_batch_size

    def _permutation(self, epoch: int) -> np.ndarray:
        key = np.array([self.seed % 2**64, self.stream + epoch], dtype=np.uint64)
        return np.argsort(np.random.Philox(key=key).random_raw(self.num_samples), kind="stable")


@dataclass(frozen=True)
class Reader:
    """Who reads: data-parallel rank `dp_rank` of `dp_size`, for `local` of `heads` LTE heads, from number `head` on.

    A head's share of a batch is a contiguous slice of it, a data-parallel rank's is one of that."""

    dp_rank: int = 0
    dp_size: int = 1
    head: int = 0
    heads: int = 1
    local: int = 1


class TrainLoader:
    """The micro-batches of one rank.

    Raises:
        UserError: the global batch is no multiple of micro batch times ranks, or a micro-batch not of the heads in it.
    """

    def __init__(self, store: Samples, order: BatchOrder, micro_batch_size: int, reader: Reader) -> None:
        lines = reader.dp_size * reader.heads // reader.local
        require(
            order.global_batch_size % (micro_batch_size * lines) == 0 and micro_batch_size % reader.local == 0,
            f"train.global_batch_size {order.global_batch_size} must be a multiple of train.micro_batch_size "
            f"{micro_batch_size} x {lines} ranks that read different samples, and train.micro_batch_size of the "
            f"{reader.local} heads in a process: change one of them.",
        )
        self._store, self._order, self._micro, self._reader = store, order, micro_batch_size, reader

    def micro_batches(self, k: int) -> list[torch.Tensor]:
        """This rank's part of batch k: token ids, each int64 [micro_batch_size, seq_len + 1], head by head."""
        reader = self._reader
        by_head = self._order.indices(k).reshape(reader.heads, reader.dp_size, -1)
        share = by_head[reader.head : reader.head + reader.local, reader.dp_rank]
        each = self._micro // reader.local
        pieces = [share[:, start : start + each].reshape(-1) for start in range(0, share.shape[1], each)]
        return [self._store.batch(piece) for piece in pieces]


def eval_batches(
    store: Samples, micro_batch_size: int, dp_rank: int, dp_size: int, limit: int | None = None
) -> Iterator[torch.Tensor]:
    """This rank's validation batches, int64 [up to micro_batch_size, seq_len + 1].

    Over all ranks they hold each of the samples 0..min(limit, len(store)) - 1 once; ranks may get unequal numbers, even
    none.

    Raises:
        UserError: at once, if the validation text gives no sample.
    """
    require(
        len(store) > 0,
        f"The validation text must give at least one sample of train.seq_len {store.seq_len} + 1 tokens, but it is "
        "shorter: give more text, raise data.val_fraction or lower train.seq_len.",
    )
    count = len(store) if limit is None else min(limit, len(store))
    first, end = count * dp_rank // dp_size, count * (dp_rank + 1) // dp_size
    return (store.batch(range(i, min(i + micro_batch_size, end))) for i in range(first, end, micro_batch_size))

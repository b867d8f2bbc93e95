"""Cut tokens into samples, and define which rank sees which samples at each step.

A `TokenStore` is a flat array of tokens on disk. Its samples of S + 1 tokens overlap by one token, so every token but
the first is predicted exactly once.

The seed alone fixes one global order of batches. The order is an endless sequence of permutations, one per epoch, and
batch k is a slice of it. So a batch is a pure function of k, and the position of a run is just k. A data-parallel rank
takes its slice of the batch and cuts it into micro-batches. The numbers of ranks and micro-batches do not change the
order. The permutations sort Philox's raw 64-bit stream, which numpy guarantees to keep stable.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import numpy as np
import torch

from megatron_switchlora.config.errors import UserError, require
from megatron_switchlora.startup.device import pinned

STREAM = 0xDA7A << 32  # separates the data order's random streams from others of the same seed
REBUILD = "remove its folder, and the next start will tokenise the text again"


class Samples:
    """Samples of seq_len + 1 tokens; sample i starts at token i * seq_len, so neighbours share one token."""

    def __init__(self, tokens: np.ndarray | TokenStore, seq_len: int) -> None:
        self._tokens, self.seq_len = tokens, seq_len

    def __len__(self) -> int:
        return max(len(self._tokens) - 1, 0) // self.seq_len

    def batch(self, indices: Sequence[int] | np.ndarray) -> torch.Tensor:
        """Return token ids, int64 [len(indices), seq_len + 1].

        Raises:
            IndexError: an index is outside 0..len-1.
        """
        rows = np.empty((len(indices), self.seq_len + 1), dtype=np.int64)
        for row, index in zip(rows, indices, strict=True):
            if not 0 <= index < len(self):
                raise IndexError(f"sample {index} of {len(self)}")
            start = int(index) * self.seq_len
            row[:] = self._tokens[start : start + self.seq_len + 1]
        return torch.from_numpy(rows)


class TokenStore:
    """A flat array of tokens, each below `vocab_size`, in a .npy file (uint16 or uint32 [tokens]).

    Each slice is read from the file on request. The file is not mapped, since a mapped file that is cut off, or on a
    failing disk, would kill the process.

    Raises:
        UserError: the file is not such an array; or, from a slice, it cannot be read or holds a larger token.
    """

    def __init__(self, path: Path, vocab_size: int) -> None:
        self.path, self._vocab_size = path, vocab_size
        try:
            self._file = path.open("rb", buffering=0)
            np.lib.format.read_magic(self._file)  # the next line fails unless this is version 1.0
            shape, _, self.dtype = np.lib.format.read_array_header_1_0(self._file)
        except Exception as error:  # numpy raises many types, and its messages recommend pickle
            reason = error.strerror if isinstance(error, OSError) else "its header is damaged"
            raise UserError(f"{path} cannot be read ({reason}): {REBUILD}.") from error
        self._head = self._file.tell()
        self.num_tokens = int(shape[0]) if len(shape) == 1 else -1
        complete = self._head + self.num_tokens * self.dtype.itemsize == os.fstat(self._file.fileno()).st_size
        require(
            self.dtype in (np.uint16, np.uint32) and complete,
            f"{path} cannot be read (its header says {self.dtype} {list(shape)}): {REBUILD}.",
        )

    def __len__(self) -> int:
        return self.num_tokens

    def __getitem__(self, part: slice) -> np.ndarray:
        """Return a copy of consecutive tokens."""
        first, end, _ = part.indices(self.num_tokens)
        width = self.dtype.itemsize
        try:
            content = os.pread(self._file.fileno(), max(end - first, 0) * width, self._head + first * width)
            tokens = np.frombuffer(content, self.dtype)
        except (OSError, ValueError) as error:  # ValueError: half a token
            raise UserError(f"{self.path} cannot be read ({error}): check its disk.") from error
        if len(tokens) < end - first:
            raise UserError(f"{self.path} ends before token {end}: {REBUILD}.")
        if (largest := int(tokens.max(initial=0))) >= self._vocab_size:
            raise UserError(
                f"{self.path} holds token {largest}, but the vocabulary has {self._vocab_size} entries: {REBUILD}."
            )
        return tokens

    def fingerprint(self) -> bytes:
        """Return the SHA-256 of length and content: of all of it up to 64 Mi tokens, else of 1,024 even blocks."""
        digest = hashlib.sha256(f"{self.dtype} {self.num_tokens}".encode())
        count, block = 1024, 1 << 16
        starts: Iterable[int] = range(0, self.num_tokens, block)
        if self.num_tokens > count * block:
            starts = np.linspace(0, self.num_tokens - block, count).astype(np.int64).tolist()
        for start in starts:
            digest.update(self[start : start + block].tobytes())
        return digest.digest()

    def samples(self, seq_len: int) -> Samples:
        """Cut the array into (num_tokens - 1) // seq_len samples; leave out tokens that fill no sample."""
        return Samples(self, seq_len)


class BatchOrder:
    """The global order of batches of `global_batch_size` out of `num_samples` samples.

    Another `stream` of the same seed gives another order.

    Raises:
        UserError: there are fewer samples than one global batch.
    """

    def __init__(self, num_samples: int, global_batch_size: int, seed: int, stream: int = STREAM) -> None:
        require(
            num_samples >= global_batch_size,
            f"The training text must give at least one global batch, but it has {num_samples} samples of train.seq_len "
            f"tokens and train.global_batch_size is {global_batch_size}: give more text or lower one of them.",
        )
        self.num_samples, self.global_batch_size, self.seed = num_samples, global_batch_size, seed
        self.stream = stream
        self._permutations: dict[int, np.ndarray] = {}  # by epoch, those of the latest batch

    def indices(self, k: int) -> np.ndarray:
        """Return the samples of batch k (from 0), int64 [global_batch_size]; a batch may span two epochs."""
        positions = np.arange(k * self.global_batch_size, (k + 1) * self.global_batch_size)
        epochs, places = np.divmod(positions, self.num_samples)
        kept = self._permutations
        self._permutations = {e: kept[e] if e in kept else self._permutation(e) for e in np.unique(epochs).tolist()}
        return np.concatenate([order[places[epochs == e]] for e, order in self._permutations.items()])

    def batches_in(self, epochs: int) -> int:
        """Return the number of whole batches in `epochs` passes over the data."""
        return epochs * self.num_samples // self.global_batch_size

    def _permutation(self, epoch: int) -> np.ndarray:
        key = np.array([self.seed % 2**64, self.stream + epoch], dtype=np.uint64)
        return np.argsort(np.random.Philox(key=key).random_raw(self.num_samples), kind="stable")


@dataclass(frozen=True)
class Reader:
    """The reading rank: `dp_rank` of `dp_size`, for `local` LTE heads of `heads`, the first of which is `head`.

    A head's share of a batch is a contiguous slice. A data-parallel rank's share is a contiguous slice of that.
    """

    dp_rank: int = 0
    dp_size: int = 1
    head: int = 0
    heads: int = 1
    local: int = 1


class TrainLoader:
    """The micro-batches of one rank.

    Raises:
        UserError: the global batch is not a multiple of the micro-batch times the ranks that read different samples.
            The micro-batch is not a multiple of the heads in a process.
    """

    def __init__(self, store: Samples, order: BatchOrder, micro_batch_size: int, reader: Reader) -> None:
        ranks = reader.dp_size * reader.heads // reader.local
        require(
            order.global_batch_size % (micro_batch_size * ranks) == 0 and micro_batch_size % reader.local == 0,
            f"train.global_batch_size {order.global_batch_size} must be a multiple of train.micro_batch_size "
            f"{micro_batch_size} x {ranks} ranks that read different samples. train.micro_batch_size must be a "
            f"multiple of the {reader.local} heads in a process. Change one of them.",
        )
        self._store, self._order, self._micro, self._reader = store, order, micro_batch_size, reader

    def micro_batches(self, k: int) -> list[torch.Tensor]:
        """Return this rank's share of batch k: token ids, each int64 [micro_batch_size, seq_len + 1], head by head."""
        reader = self._reader
        by_head = self._order.indices(k).reshape(reader.heads, reader.dp_size, -1)
        share = by_head[reader.head : reader.head + reader.local, reader.dp_rank]
        per_head = self._micro // reader.local
        pieces = [share[:, start : start + per_head].reshape(-1) for start in range(0, share.shape[1], per_head)]
        return [self._store.batch(piece) for piece in pieces]


class ReadAhead:
    """Read the micro-batches of the next step in a thread while one trains; for a GPU into pinned memory.

    A step's micro-batches stay a function of its number alone. What the thread raises, the step that needs the batch
    raises. Steps from `end` on are not read ahead.
    """

    def __init__(self, loader: TrainLoader, device: torch.device, end: int) -> None:
        self._loader, self._device, self._end = loader, device, end
        self._thread = ThreadPoolExecutor(1, "read-ahead", initializer=self._begin)
        self._next: Optional[tuple[int, Future[list[torch.Tensor]]]] = None

    def micro_batches(self, k: int) -> list[torch.Tensor]:
        """Return what the loader returns for batch k, and start to read the next one."""
        step, reading = self._next or (-1, None)
        if step != k or reading is None:
            reading = self._thread.submit(self._read, k)
        batches, self._next = reading.result(), None
        if k + 1 < self._end:
            self._next = k + 1, self._thread.submit(self._read, k + 1)
        return batches

    def _begin(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # else the thread would pin memory through the first GPU

    def _read(self, k: int) -> list[torch.Tensor]:
        return [pinned(batch, self._device) for batch in self._loader.micro_batches(k)]


def eval_batches(
    store: Samples, micro_batch_size: int, dp_rank: int, dp_size: int, limit: int | None = None
) -> Iterator[torch.Tensor]:
    """Return this rank's validation batches, int64 [up to micro_batch_size, seq_len + 1].

    Over all ranks they hold each of the samples 0..min(limit, len(store)) - 1 once. Ranks may get different numbers of
    batches, even none.

    Raises:
        UserError: the validation text gives no sample; raised before the first batch.
    """
    require(
        len(store) > 0,
        f"The validation text must give at least one sample of train.seq_len {store.seq_len} + 1 tokens, but it is "
        "shorter: give more text, raise data.val_fraction or lower train.seq_len.",
    )
    count = len(store) if limit is None else min(limit, len(store))
    first, end = count * dp_rank // dp_size, count * (dp_rank + 1) // dp_size
    return (store.batch(range(i, min(i + micro_batch_size, end))) for i in range(first, end, micro_batch_size))

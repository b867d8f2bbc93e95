"""Every sample in its place: one order, whatever the number of ranks and micro-batches."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_switchlora.config.errors import UserError
from megatron_switchlora.data import BatchOrder, Reader, Samples, TokenStore, TrainLoader, eval_batches
from megatron_switchlora.data.loader import ReadAhead

EPOCH_0 = [5, 6, 8, 3, 4, 7, 0, 1, 9, 2]
EPOCH_1 = [5, 8, 2, 3, 4, 0, 1, 7, 6, 9]


def samples(tmp_path: Path, tokens: int, seq_len: int = 4) -> Samples:
    np.save(tmp_path / "tokens.npy", np.arange(tokens, dtype=np.uint16))
    return TokenStore(tmp_path / "tokens.npy", 2**16).samples(seq_len)


# --- samples


@pytest.mark.parametrize(("tokens", "expected"), [(0, 0), (1, 0), (4, 0), (5, 1), (8, 1), (9, 2), (41, 10)])
def test_number_of_samples(tokens: int, expected: int) -> None:
    assert len(Samples(np.zeros(tokens, dtype=np.uint16), 4)) == expected


def test_samples_predict_every_token_once(tmp_path: Path) -> None:
    store = samples(tmp_path, 41)
    batch = store.batch(range(10))
    assert batch.dtype == torch.int64 and batch.shape == (10, 5)
    assert batch[3].tolist() == [12, 13, 14, 15, 16]
    assert batch[:, 1:].flatten().tolist() == list(range(1, 41))
    assert store.batch(np.array([9, 0])).tolist() == [[36, 37, 38, 39, 40], [0, 1, 2, 3, 4]]
    for wrong in (-1, 10):
        with pytest.raises(IndexError):
            store.batch([wrong])


def test_wide_tokens_survive(tmp_path: Path) -> None:
    np.save(tmp_path / "wide.npy", np.array([0, 70_000, 2**32 - 1], dtype=np.uint32))
    store = TokenStore(tmp_path / "wide.npy", 2**32)
    assert store.num_tokens == 3
    assert store.samples(2).batch([0]).tolist() == [[0, 70_000, 2**32 - 1]]


# --- order


def test_epochs_are_different_permutations() -> None:
    order = BatchOrder(num_samples=10, global_batch_size=4, seed=3)
    stream = np.concatenate([order.indices(k) for k in range(10)])  # 40 samples, 4 epochs; batches span their ends
    epochs = stream.reshape(4, 10)
    for epoch in epochs:
        assert sorted(epoch) == list(range(10))
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert stream.dtype == np.int64


def test_order_is_a_function_of_k_alone() -> None:
    forward = BatchOrder(10, 4, 3)
    expected = [forward.indices(k).tolist() for k in range(12)]
    for k in (11, 2, 3, 0, 7, 2):
        assert BatchOrder(10, 4, 3).indices(k).tolist() == expected[k]
        assert forward.indices(k).tolist() == expected[k]
    assert len(forward._permutations) <= 2


def test_permutations_are_drawn_once_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    original = BatchOrder._permutation

    def spy(order: BatchOrder, epoch: int) -> np.ndarray:
        drawn.append(epoch)
        return original(order, epoch)

    monkeypatch.setattr(BatchOrder, "_permutation", spy)
    order = BatchOrder(10, 4, 3)
    for k in range(6):
        order.indices(k)
    assert drawn == [0, 1, 2]


def test_order_is_the_published_one() -> None:
    """A resumed run needs today's order for ever: numbers of Philox, which numpy does not change."""
    assert BatchOrder(10, 10, 0).indices(0).tolist() == EPOCH_0
    assert BatchOrder(10, 10, 0).indices(1).tolist() == EPOCH_1
    assert BatchOrder(10, 10, 1).indices(0).tolist() not in (EPOCH_0, EPOCH_1)


def test_batch_size_does_not_change_the_order() -> None:
    one = np.concatenate([BatchOrder(12, 2, 5).indices(k) for k in range(12)])
    other = np.concatenate([BatchOrder(12, 8, 5).indices(k) for k in range(3)])
    assert one.tolist() == other.tolist()


def test_whole_batch_may_be_an_epoch_and_large_seeds_work() -> None:
    assert sorted(BatchOrder(5, 5, 2**64 - 1).indices(7)) == list(range(5))
    assert sorted(BatchOrder(5, 5, 2**80).indices(7)) == list(range(5))


def test_batches_in_epochs() -> None:
    order = BatchOrder(10, 4, 0)
    assert [order.batches_in(epochs) for epochs in (1, 2, 3, 4)] == [2, 5, 7, 10]


def test_too_short_a_corpus_is_refused() -> None:
    BatchOrder(32, 32, 0)
    with pytest.raises(UserError, match=r"31 samples .* train\.global_batch_size is 32: give more text or lower"):
        BatchOrder(31, 32, 0)


# --- ranks and micro-batches


@pytest.mark.parametrize("dp_size", [1, 2, 4])
@pytest.mark.parametrize("micro", [1, 2])
def test_ranks_and_micro_batches_share_out_the_batch(tmp_path: Path, dp_size: int, micro: int) -> None:
    store = samples(tmp_path, 4 * 20 + 1)
    for k in (0, 1, 2, 5):  # batch 2 spans the end of the first epoch
        expected = store.batch(BatchOrder(20, 8, 1).indices(k))
        shares = []
        for rank in range(dp_size):
            loader = TrainLoader(store, BatchOrder(20, 8, 1), micro, Reader(rank, dp_size))
            parts = loader.micro_batches(k)
            assert [part.shape for part in parts] == [(micro, 5)] * (8 // micro // dp_size)
            shares += parts
        assert torch.equal(torch.cat(shares), expected)


def test_uneven_shares_are_refused(tmp_path: Path) -> None:
    store = samples(tmp_path, 200)
    with pytest.raises(UserError, match=r"8 must be a multiple of train\.micro_batch_size 3 x 2"):
        TrainLoader(store, BatchOrder(20, 8, 1), 3, Reader(0, 2))


@pytest.mark.parametrize("dp_size", [1, 2, 3, 16])
@pytest.mark.parametrize("limit", [None, 1, 7, 13, 100])
def test_validation_covers_each_sample_once(tmp_path: Path, dp_size: int, limit: int | None) -> None:
    store = samples(tmp_path, 4 * 13 + 1)
    batches = [list(eval_batches(store, 3, rank, dp_size, limit)) for rank in range(dp_size)]
    seen = [int(row[0]) // 4 for part in batches for batch in part for row in batch]
    assert seen == list(range(min(limit or 13, 13)))
    for part in batches:
        assert all(len(batch) == 3 for batch in part[:-1]) and all(1 <= len(batch) <= 3 for batch in part)
    counts = [sum(map(len, part)) for part in batches]
    assert max(counts) - min(counts) <= 1


def test_validation_without_a_sample_is_refused_at_once(tmp_path: Path) -> None:
    store = samples(tmp_path, 4)
    with pytest.raises(UserError, match=r"at least one sample of train\.seq_len 4 \+ 1"):
        eval_batches(store, 1, 0, 1, None)


@pytest.mark.parametrize(("groups", "local", "dp"), [(1, 4, 1), (4, 1, 1), (2, 2, 2)])
def test_heads_read_their_slices_of_the_batch(tmp_path: Path, groups: int, local: int, dp: int) -> None:
    """Whether heads are on ranks or share a process, head n reads slice n, and its data ranks its parts in turn."""
    store = samples(tmp_path, 4 * 20 + 1)
    order = BatchOrder(20, 16, 1)
    whole = store.batch(order.indices(3))
    for group in range(groups):
        for rank in range(dp):
            reader = Reader(rank, dp, group * local, groups * local, local)
            found = TrainLoader(store, order, 2 * local // dp, reader).micro_batches(3)
            by_head = torch.stack([piece.unflatten(0, (local, -1)) for piece in found], 1).flatten(1, 2)
            for head, tokens in enumerate(by_head, group * local):
                assert torch.equal(tokens, whole.chunk(groups * local)[head].chunk(dp)[rank])


# --- read ahead


class Watched:
    """A loader that notes which batch is read in which thread; one of them fails."""

    def __init__(self, bad: int = -1) -> None:
        self.read: list[tuple[int, bool]] = []
        self.bad = bad

    def micro_batches(self, k: int) -> list[torch.Tensor]:
        self.read.append((k, threading.current_thread() is threading.main_thread()))
        if k == self.bad:
            raise UserError(f"batch {k} cannot be read")
        return [torch.tensor([k])]


def test_the_next_batch_is_read_while_a_step_trains() -> None:
    loader = Watched()
    ahead = ReadAhead(loader, torch.device("cpu"), 12)  # type: ignore[arg-type]
    assert ahead.micro_batches(10)[0].tolist() == [10]
    deadline = time.monotonic() + 10
    while len(loader.read) < 2 and time.monotonic() < deadline:  # nobody asks for batch 11
        time.sleep(0.001)
    assert loader.read == [(10, False), (11, False)]
    assert [ahead.micro_batches(k)[0].item() for k in (11, 3, 4, 11, 11)] == [11, 3, 4, 11, 11]  # whatever came before
    assert (12, False) not in loader.read


def test_an_error_ahead_belongs_to_the_step_that_needs_the_batch() -> None:
    ahead = ReadAhead(Watched(bad=1), torch.device("cpu"), 5)  # type: ignore[arg-type]
    assert ahead.micro_batches(0)[0].item() == 0
    with pytest.raises(UserError, match="batch 1 cannot be read"):
        ahead.micro_batches(1)
    assert ahead.micro_batches(2)[0].item() == 2

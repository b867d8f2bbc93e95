"""NormalFloat4: nearest levels, exact on what it made itself, alike with bitsandbytes where that is installed."""

from __future__ import annotations

import pytest
import torch

from megatron_switchlora.lowrank.nf4 import LEVELS, Nf4Matrix, bitsandbytes_works, dequantise, quantise


def test_values_go_to_the_nearest_level_of_their_block() -> None:
    matrix = torch.randn(5, 144, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    codes, scales = quantise(matrix, torch.tensor(LEVELS))
    assert codes.shape == (5, 96) and scales.shape == (5, 3)  # rows padded to 192
    found = dequantise(codes, scales, 144, torch.tensor(LEVELS))
    for row in range(5):
        for start in (0, 64, 128):
            block = matrix[row, start : start + 64]
            levels = torch.tensor(LEVELS) * block.abs().max()
            nearest = levels[(block[:, None] - levels).abs().argmin(1)]
            assert torch.equal(found[row, start : start + 64], nearest)


def test_quantising_again_changes_nothing_and_zeros_stay() -> None:
    matrix = torch.randn(8, 100, generator=torch.Generator().manual_seed(1))
    matrix[3] = 0
    made = Nf4Matrix(matrix, bitsandbytes_works(torch.device("cpu")))
    first = made.dequantised(torch.float32)
    codes, scales = made.codes.clone(), made.scales.clone()
    made.store(first)
    assert torch.equal(made.codes, codes) and torch.equal(made.scales, scales)
    assert not first[3].any()


@pytest.mark.parametrize("kernels", [False, True])
def test_a_layer_and_its_gradient_are_those_of_the_levels(kernels: bool) -> None:
    """Against torch's own linear over the levels as a dense matrix."""
    if kernels and not bitsandbytes_works(torch.device("cpu")):
        pytest.skip("bitsandbytes is not installed")
    generator = torch.Generator().manual_seed(3)
    made = Nf4Matrix(torch.randn(48, 100, generator=generator), kernels)
    dense = dequantise(made.codes, made.scales, 100, made.levels)
    x = torch.randn(2, 7, 100, generator=generator)
    dy = torch.randn(2, 7, 48, generator=generator)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, wanted = made.linear(mine), torch.nn.functional.linear(theirs, dense)
    y.backward(dy)
    wanted.backward(dy)
    assert mine.grad is not None and theirs.grad is not None
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-5)


def test_bitsandbytes_gives_the_same() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    matrix = torch.randn(64, 128, generator=torch.Generator().manual_seed(2))
    codes, state = functional.quantize_4bit(matrix, quant_type="nf4", blocksize=64)
    mine = Nf4Matrix(matrix, kernels=True)
    assert torch.equal(codes.view(64, 64), mine.codes)
    assert torch.equal(state.absmax.view(64, 2), mine.scales)
    assert bitsandbytes_works(torch.device("cpu"))
    theirs = functional.dequantize_4bit(codes, state)
    assert torch.allclose(mine.dequantised(torch.float32), theirs, rtol=1e-6, atol=0)

"""Names of LTE heads: what is written is read again."""

from __future__ import annotations

import re

import pytest

from megatron_switchlora.distributed.head_names import LABEL, head_label, of_head, split_head


@pytest.mark.parametrize("number", [0, 7, 42, 123])
def test_a_heads_tensor_is_read_as_it_was_written(number: int) -> None:
    assert split_head(of_head(number, "model.norm.weight:exp_avg")) == (number, "model.norm.weight:exp_avg")
    assert re.fullmatch(LABEL, head_label(number))


def test_what_all_heads_share_has_no_head() -> None:
    assert of_head(3, "w") == "head_03/w"
    for name in ("model.norm.weight", "head_x/w", "lm_head.weight", "head_03"):
        assert split_head(name) == (None, name)

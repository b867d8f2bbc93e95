"""A full-rank start before every method: alike until the method begins, and that leaves the function as it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.dist.launch import run_ranks
from tests.system.commands import Place

WARM = 4
METHODS = {
    "lora": "--method.name lora",
    "lora_classic": "--method.name lora --method.init classic",
    "lora_plus": "--method.name lora --optim.lora_plus_ratio 4",
    "pissa": "--method.name lora --method.init pissa --method.alpha 8 --method.base_spread dp",
    "lora_ga": "--method.name lora --method.init lora_ga --method.rslora true --method.alpha 4 --method.ga.samples 8 "
    "--method.base_spread dp",
    "relora": "--method.name relora --method.init classic --method.relora.interval 4 --method.relora.warmup 1 "
    "--method.base_spread dp",
    "galore": "--method.name galore",
    "mhlora": "--method.name mhlora --method.mhlora.heads 2 --method.base_spread dp",
    "lte": "--method.name lte --parallel.lte_heads 2 --method.lte.merge_interval 3",
    "lte_local": "--method.name lte --method.lte.local_heads 2 --method.lte.merge_interval 3 "
    "--method.lte.merge_form reset",
    "lte_switchlora": "--method.name lte --parallel.lte_heads 2 --method.lte.merge_interval 3 "
    "--method.lte.inner switchlora "
    "--method.alpha 8",
    "switchlora": "--method.name switchlora --method.base_spread node",
}


@pytest.mark.full
@pytest.mark.timeout(400)
def test_every_method_goes_on_from_full_rank_training(tmp_path: Path) -> None:
    """Two data ranks. The losses of the start are full-rank training's to the bit, the method's first is that of its
    weights, and the method then learns on."""
    pytest.importorskip("galore_torch")
    place = Place(tmp_path)
    fixed = ["--method.rank", "8", "--optim.lr", "0.001", "--optim.dense_lr", "0.004", "--train.eval_interval", "4"]
    warm = f"--method.full_rank_steps {WARM} --method.full_rank_lr 0.004".split()
    options = place.options("runs", *fixed, "--data.cache_dir", str(tmp_path / "cache"))
    runs = [["--method.name", "full", "--optim.lr", "0.004"], *([*text.split(), *warm] for text in METHODS.values())]
    payload = {"options": options, "runs": runs, "stage": 0}
    run_ranks(2, "tests.system.warm_start_worker", payload, timeout=360)
    full, *others = (place.records(f"runs/run{number}") for number in range(len(runs)))
    wanted = [record["loss"] for record in full if "loss" in record]
    for name, records in zip(METHODS, others, strict=True):
        losses = [record["loss"] for record in records if "loss" in record]
        evaluated = [record["val_loss"] for record in records if "val_loss" in record]
        print(f"{name:15} {losses[WARM] / wanted[WARM] - 1:+.1e} {evaluated}")
        assert losses[:WARM] == wanted[:WARM], name
        assert losses[WARM] == pytest.approx(wanted[WARM], rel=1e-6), name
        assert evaluated[1] == full[WARM + 1]["val_loss"], name
        assert evaluated[-1] < evaluated[1] - 0.01, name

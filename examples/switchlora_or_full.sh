#!/usr/bin/env bash
# Train with full rank and with SwitchLoRA: the same model, batches and steps, each at its own learning rate.
set -euo pipefail
steps=${STEPS:-260}
for method in full switchlora; do
  rates=(--optim.lr 0.02 --optim.dense_lr 0.02)  # the best on Tiny Shakespeare, at a model of this size
  [ "$method" = switchlora ] || rates=(--optim.lr 0.002 --optim.dense_lr 0.04)
  deepspeed --num_gpus 2 --master_port "${PORT:-29500}" --module megatron_switchlora.launch.pretrain --config cpu_quickstart --ds_config zero1 \
    --method.name "$method" "${rates[@]}" --output_dir "compare_$method" \
    --train.steps "$steps" --train.warmup_steps $((steps / 10))
done

python - <<'EOF_TABLE'
import json, pathlib
print(f"{'method':<12}{'perplexity':>12}{'trained parameters':>20}{'gradient bytes per step':>25}")
for method in ("full", "switchlora"):
    run = pathlib.Path(f"compare_{method}")
    meta = json.loads((run / "meta.json").read_text())
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    sent = max(record.get("dp_bytes", 0) for record in steps)
    print(f"{method:<12}{meta['val_ppl']:>12.2f}{meta['parameters']['trainable']:>20,}{sent:>25,}")
EOF_TABLE
# One seed and one rate each decide nothing: `switchlora compare` sweeps the rates of every method over seeds.

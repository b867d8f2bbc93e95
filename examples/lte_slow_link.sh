#!/usr/bin/env bash
# Train two LTE heads, one per rank: between merges, every 10 steps, they exchange no gradients.
set -euo pipefail
steps=${STEPS:-200}
deepspeed --num_gpus 2 --master_port "${PORT:-29500}" --module megatron_switchlora.launch.pretrain --config cpu_quickstart --ds_config zero0 \
  --method.name lte --method.lte.merge_interval 10 --parallel.lte_heads 2 \
  --optim.lr 0.00003 --optim.dense_lr 0.02 --output_dir slow_link \
  --train.steps "$steps" --train.warmup_steps $((steps / 10))

python - <<'EOF_TABLE'
import json, pathlib
records = [json.loads(line) for line in pathlib.Path("slow_link/metrics.jsonl").read_text().splitlines()]
records = [record for record in records if "loss" in record]
gradients = sum(record["dp_bytes"] for record in records)
merges = sum(record.get("merge_bytes", 0) for record in records)
print(f"Sent in {len(records)} steps: gradients {gradients:,} bytes, merges {merges:,} bytes.")
EOF_TABLE
# What would data parallelism send? The prediction for two ranks of the same model:
switchlora volume --world 2 --config cpu_quickstart --method methods/full --out slow_link/full.json

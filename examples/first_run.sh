#!/usr/bin/env bash
# Train a small model with SwitchLoRA on two ranks, look at it, and train it further.
set -euo pipefail
steps=${STEPS:-260}
options=(--config cpu_quickstart --ds_config zero1 --output_dir first_run
  --train.steps "$steps" --train.warmup_steps $((steps / 10)))

# What will it need? Nothing is read or trained.
switchlora pretrain "${options[@]}" --dry_run --dry_run_world 2

# Train the first half, then give the same command again: it resumes. Status 75 means: stopped as asked, not finished.
train() { deepspeed --num_gpus 2 --master_port "${PORT:-29500}" --module megatron_switchlora.launch.pretrain "${options[@]}" "$@"; }
train --train.stop_after_steps $((steps / 2)) || [ $? -eq 75 ]
train

switchlora generate first_run "def read(" --max_new_tokens 40

#!/usr/bin/env bash
# Import a LLaMA in Hugging Face's format, continue its pre-training with SwitchLoRA, and export it again.
#   bash hugging_face.sh MODEL_FOLDER
set -euo pipefail
model=${1:?give the folder of a LLaMA, such as first_run/final}
steps=${STEPS:-100}
switchlora convert import "$model" imported
switchlora pretrain --config imported/model.yaml --train.init_from imported --data.tokenizer imported/tokenizer \
  --method.name switchlora --method.rank 8 --optim.lr 0.002 --optim.dense_lr 0.002 --train.seq_len 128 \
  --train.steps "$steps" --train.warmup_steps $((steps / 10)) --output_dir continued

switchlora convert export continued exported --dtype fp32         # one folder, adapters folded in
switchlora convert export continued exported_peft --peft          # base and adapter
python - <<'EOF_LOAD'
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (kind.from_pretrained("exported") for kind in (AutoModelForCausalLM, AutoTokenizer))
print(tokenizer.decode(model.generate(**tokenizer("def read(", return_tensors="pt"), max_new_tokens=20)[0]))
EOF_LOAD

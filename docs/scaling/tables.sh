#!/bin/bash
# Prints the tables of docs/results/scaling.md, after `make`: bash docs/scaling/tables.sh. Needs no GPU. PYTHON: not .venv's.
cd "$(dirname "$0")/../.." || exit 1
export PYTHONPATH="$PWD"
PLAN="${PYTHON:-.venv/bin/python} tools/plan.py --brief --gpus 8 --adapters 8"
SMALL="--config launch/configs/llama_1.3b.yaml --nodes 16 --gpu h100"
overlap=$(mktemp) problem=$(mktemp)
echo '{"zero_optimization": {"stage": 1, "overlap_comm": true}}' > "$overlap"

table() {
    printf '\n%s\n\n' "$1"
    echo "| method | mesh | memory | compute | communication not hidden | step | tokens/s | a node sends | checkpoint |"
    echo "|---|---|---|---|---|---|---|---|---|"
}
plan() {  # name, then options; what does not fit is a row too
    name=$1
    shift
    $PLAN "$@" --name "$name" 2> "$problem" && return
    grep -q '^error: Nothing fits' "$problem" || { cat "$problem" >&2; exit 1; }
    echo "| $name | $(sed 's/^error: //; s/ Give more.*//' "$problem") |||||||"
}
low() { echo "--method.name switchlora --method.rank $1"; }

for link in 400Gb 10Gb; do
    table "**1.3B, 16 nodes of 8 H100, 8 adapters of $link a node**"
    plan "full-rank" $SMALL --link $link --config launch/configs/methods/full.yaml
    plan "SwitchLoRA r 512" $SMALL --link $link
    plan "SwitchLoRA r 256" $SMALL --link $link --config launch/configs/methods/switchlora_r256.yaml
    plan "LTE, 16 heads of r 64, T 10" $SMALL --link $link --config launch/configs/methods/lte_r64.yaml --parallel.lte_heads 16
done
SEVEN="--config docs/scaling/llama_7b.yaml --gpu h100"
for place in "8 400Gb" "8 25Gb" "128 100Gb"; do
    set -- $place
    table "**7B, $1 nodes of 8 H100, 8 adapters of $2 a node**"
    plan "full-rank" $SEVEN --nodes $1 --link $2 --method.name full
    plan "full-rank, gradients hidden" $SEVEN --nodes $1 --link $2 --method.name full --ds_config "$overlap"
    plan "SwitchLoRA r 1024" $SEVEN --nodes $1 --link $2 $(low 1024)
    plan "SwitchLoRA r 512" $SEVEN --nodes $1 --link $2 $(low 512)
    plan "SwitchLoRA r 512, gradients hidden" $SEVEN --nodes $1 --link $2 $(low 512) --ds_config "$overlap"
    plan "LTE, 8 heads of r 64, T 10" $SEVEN --nodes $1 --link $2 --method.name lte --method.rank 64 --parallel.lte_heads 8
done
SEVENTY="--config docs/scaling/llama_70b.yaml --link 400Gb"
for place in "64 h100" "512 h100" "64 h200"; do
    set -- $place
    table "**70B, $1 nodes of 8 ${2^^}, 8 adapters of 400Gb a node**"
    plan "full-rank" $SEVENTY --nodes $1 --gpu $2 --method.name full
    plan "SwitchLoRA r 1024" $SEVENTY --nodes $1 --gpu $2 $(low 1024)
    plan "SwitchLoRA r 1024, bank in host memory" $SEVENTY --nodes $1 --gpu $2 $(low 1024) --method.switch.bank_device host
    plan "LTE, 8 heads of r 64, T 10, W in 4 bits" $SEVENTY --nodes $1 --gpu $2 --method.name lte --method.rank 64 \
        --parallel.lte_heads 8 --method.lte.base nf4
done
TRILLION="--config docs/scaling/llama_1t.yaml --link 400Gb --nodes 384 --gpu b200"
for tp in 8 32; do
    table "**10^12 parameters, 384 nodes of 8 B200, 8 adapters of 400Gb a node, tensor parallelism up to $tp**"
    plan "full-rank" $TRILLION --max_tp $tp --method.name full
    plan "SwitchLoRA r 3200, bank in host memory" $TRILLION --max_tp $tp $(low 3200) --method.switch.bank_device host
    plan "LTE, 6 heads of r 64, T 10, W in 4 bits" $TRILLION --max_tp $tp --method.name lte --method.rank 64 \
        --parallel.lte_heads 6 --method.lte.base nf4
done
rm -f "$overlap" "$problem"

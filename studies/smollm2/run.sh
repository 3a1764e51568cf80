#!/bin/bash
# SFT, SFT continued, SPIN, online Plackett-Luce and GRPO on shell commands, with a real model.
#
#     bash studies/smollm2/run.sh SEED...
#
# Reads out/smollm2 and data/commands, see README.md. Runs go to out/commands/SEED. A finished run
# is skipped and an interrupted one resumes.
set -euo pipefail

for seed in "$@"; do
    out=out/commands/$seed
    python train.py studies/smollm2/config/sft.py --seed="$seed" --out_dir="$out/sft"
    checkpoints=("start=out/smollm2@0" "sft=$out/sft@0")
    for name in sft_more spin online_pl grpo online_pl_args grpo_args; do
        python train.py "studies/smollm2/config/$name.py" --seed="$seed" --init="$out/sft" \
            --out_dir="$out/$name"
        checkpoints+=("$name=$out/$name@0")
    done
    python eval.py "${checkpoints[@]}" --data=data/commands --rows=600 --max_prompt=96 \
        --max_response=48 --dtype=bfloat16 --out="$out/eval"
done

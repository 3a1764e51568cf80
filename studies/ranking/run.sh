#!/usr/bin/env bash
# Sums from few answers: SFT, SFT continued, online Plackett-Luce and GRPO, for each seed.
#
#     bash studies/ranking/run.sh out/ranking 1 2 3
#
# One seed takes about 12 minutes on one CPU core. Every line may be interrupted: run again, it
# resumes. PYTHON: the interpreter.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=$1
shift
python=${PYTHON:-python}
mkdir -p "$out"
if [ ! -e data/sums/prompts/meta.json ]; then
    $python -m data.addition.prepare --answers=1500 --out=data/sums
fi
for seed in "$@"; do
    run=$out/$seed
    for name in sft sft_more online_pl grpo; do
        init=""
        if [ "$name" != sft ]; then
            init=--init=$run/sft
        fi
        $python train.py config/demo/addition_$name.py --seed="$seed" --out_dir="$run/$name" $init \
            > "$out/$seed.$name.log"
    done
    $python eval.py \
        sft="$run/sft" sft_greedy="$run/sft@0" \
        sft_more="$run/sft_more" sft_more_greedy="$run/sft_more@0" \
        online_pl="$run/online_pl" online_pl_greedy="$run/online_pl@0" \
        grpo="$run/grpo" grpo_greedy="$run/grpo@0" \
        --data=data/sums/prompts --rows=1961 --out="$run/eval" > "$out/$seed.eval.log"
done
$python -m studies.ranking.summarize "$out" "$@"

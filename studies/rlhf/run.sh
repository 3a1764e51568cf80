#!/bin/bash
# All stages of RLHF and every preference objective on real ranked rows, at CPU size.
#
#     studies/rlhf/run.sh [FOLDER]
#
# The data is downloaded (README.md); or FOLDER has pretrain.jsonl.gz, sft.jsonl.gz and
# ranked.jsonl.gz. All is written to out/rlhf: the data, the runs of each seed, and in SEED/logs a
# table of them (report.md) with their logs. After an interruption, run it again: finished runs are
# skipped. Three environment variables: SEEDS (default "1 2 3"); JOBS, runs at a time with one
# thread each (default 2); and PY, the Python to use (default .venv/bin/python).
set -euo pipefail

folder=${1:+$(realpath "$1")}
cd "$(dirname "$0")/../.."
PY=${PY:-.venv/bin/python}
JOBS=${JOBS:-2}
SEEDS=${SEEDS:-1 2 3}
data=out/rlhf/data
mkdir -p out/rlhf

# the runs of one set of files must not be taken for those of another
inputs="the downloaded data"
if [ -n "$folder" ]; then
    inputs=$(cat "$folder"/{pretrain,sft,ranked}.jsonl.gz | sha256sum)
fi
[ -s out/rlhf/inputs ] || echo "$inputs" > out/rlhf/inputs
if [ "$(cat out/rlhf/inputs)" != "$inputs" ]; then
    echo "$PWD/out/rlhf was made from other files than these: move it away" >&2
    exit 1
fi

prepare() { # prepare NAME [ARGUMENT...]: make the data folder NAME by data.jsonl.prepare, once
    [ -e "$data/$1/meta.json" ] || "$PY" -m data.jsonl.prepare --out="$data/$1" "${@:2}"
}

train_parallel() { # one run per line of standard input: the arguments of train.py
    OMP_NUM_THREADS=1 xargs -P "$JOBS" -L 1 "$PY" train.py
}

if [ -n "$folder" ]; then
    prepare pretrain "$folder/pretrain.jsonl.gz" --tokenizer=bpe
    prepare sft "$folder/sft.jsonl.gz"
    prepare ranked "$folder/ranked.jsonl.gz"
else
    have() { [ -e "data/$1/meta.json" ]; }
    have gsm8k_sft || "$PY" -m data.gsm8k.prepare --val_share=0.1 --out=data/gsm8k_sft
    have gsm8k_solutions || "$PY" -m data.gsm8k.prepare --solutions=all --out=data/gsm8k_solutions
    have tldr_pages || "$PY" -m data.tldr_pages.prepare
    have stackexchange/threads || "$PY" -m data.stackexchange.prepare
    prepare pretrain data/stackexchange/threads/*.jsonl --tokenizer=bpe
    prepare sft data/{gsm8k_sft,tldr_pages,stackexchange/sft}/*.jsonl
    prepare ranked data/{gsm8k_solutions,stackexchange/ranked}/*.jsonl
fi

# each step for all seeds at once
of_seeds() { # of_seeds LINE: the line for each seed, with SEED in place of its number
    for seed in $SEEDS; do
        echo "$1 --seed=$seed" | sed "s:SEED:$seed:g"
    done
}

out=out/rlhf/SEED
of_seeds "config/local/pretrain.py --data=$data/pretrain --out_dir=$out/pretrain" | train_parallel
of_seeds "config/local/sft.py --data=$data/sft --init=$out/pretrain --out_dir=$out/sft" |
    train_parallel

# the reward model, SFT on the best responses, and every preference objective on the same rows
ranked="--data=$data/ranked"
dpo="config/local/dpo.py $ranked --init=$out/sft"
{
    of_seeds "config/local/reward.py $ranked --init=$out/sft --out_dir=$out/reward"
    of_seeds "config/local/preferred_ft.py $ranked --init=$out/pretrain --out_dir=$out/preferred_ft"
    of_seeds "$dpo --loss_type=pairs --out_dir=$out/dpo_pairs"
    of_seeds "$dpo --loss_type=pl --out_dir=$out/pl"
    of_seeds "$dpo --loss_type=pl --rank_depth=1 --out_dir=$out/pl_depth_1"
    of_seeds "$dpo --loss_type=pl --taylor_order=1 --out_dir=$out/pl_taylor_1"
    of_seeds "$dpo --loss_type=ipo --beta=0.05 --out_dir=$out/ipo"
    of_seeds "$dpo --loss_type=simpo --beta=2 --margin=0.5 --lr=5e-5 --out_dir=$out/simpo"
    of_seeds "$dpo --loss_type=orpo --beta=0.5 --nll_coef=1 --out_dir=$out/orpo"
} | train_parallel

# PPO against that reward model, and DPO with Preferred-FT as its reference
ppo="config/local/ppo.py $ranked --init=$out/sft --reward=$out/reward"
ppo="$ppo --pretrain_data=$data/pretrain"
of_preferred="config/local/dpo.py $ranked --init=$out/preferred_ft"
{
    of_seeds "$ppo --out_dir=$out/ppo"
    of_seeds "$of_preferred --out_dir=$out/dpo_of_preferred_ft"
} | train_parallel

runs=()
for seed in $SEEDS; do
    configs=(out/rlhf/"$seed"/*/config.json)
    "$PY" -m tools.plot table "out/rlhf/$seed/logs" "${configs[@]%/config.json}"
    runs+=("out/rlhf/$seed")
done
"$PY" -m studies.rlhf.table "${runs[@]}"

#!/bin/bash
# All stages of RLHF and every preference objective on real ranked rows, at CPU size.
#
#     studies/rlhf/run.sh [FOLDER]
#
# The data is downloaded (README.md); or FOLDER has pretrain.jsonl.gz, sft.jsonl.gz and
# ranked.jsonl.gz. Runs go to out/rlhf; their logs and a table of them, report.md, go to
# studies/rlhf/logs. After an interruption, run it again: finished runs are skipped. Two
# environment variables: JOBS, runs at a time with one thread each (default 2), and PY, the Python
# to use (default .venv/bin/python).
set -euo pipefail

folder=${1:+$(realpath "$1")}
cd "$(dirname "$0")/../.."
PY=${PY:-.venv/bin/python}
JOBS=${JOBS:-2}
out=out/rlhf
logs=studies/rlhf/logs
mkdir -p $logs

prepare() { # prepare NAME [ARGUMENT...]: make data/NAME by data.jsonl.prepare, unless it exists
    [ -e "data/$1/meta.json" ] || "$PY" -m data.jsonl.prepare --out="data/$1" "${@:2}"
}

train_parallel() { # one run per line of standard input: the arguments of train.py
    OMP_NUM_THREADS=1 xargs -P "$JOBS" -L 1 "$PY" train.py
}

if [ -n "$folder" ]; then
    prepare local_bpe "$folder/pretrain.jsonl.gz" --tokenizer=bpe
    prepare local_sft "$folder/sft.jsonl.gz"
    prepare ranked "$folder/ranked.jsonl.gz"
else
    have() { [ -e "data/$1/meta.json" ]; }
    have gsm8k_sft || "$PY" -m data.gsm8k.prepare --val_share=0.1 --out=data/gsm8k_sft
    have gsm8k_solutions || "$PY" -m data.gsm8k.prepare --solutions=all --out=data/gsm8k_solutions
    have tldr_pages || "$PY" -m data.tldr_pages.prepare
    have stackexchange/threads || "$PY" -m data.stackexchange.prepare
    prepare local_bpe data/stackexchange/threads/*.jsonl --tokenizer=bpe
    prepare local_sft data/{gsm8k_sft,tldr_pages,stackexchange/sft}/*.jsonl
    prepare ranked data/{gsm8k_solutions,stackexchange/ranked}/*.jsonl
fi

"$PY" train.py config/local/pretrain.py --data=data/local_bpe --out_dir=$out/pretrain
"$PY" train.py config/local/sft.py --init=$out/pretrain --out_dir=$out/sft

# the reward model, SFT on the best responses, and every preference objective on the same rows
dpo="config/local/dpo.py --init=$out/sft"
train_parallel <<END
config/local/reward.py --init=$out/sft --out_dir=$out/reward
config/local/preferred_ft.py --init=$out/pretrain --out_dir=$out/preferred_ft
$dpo --loss_type=pairs --out_dir=$out/dpo_pairs
$dpo --loss_type=pl --out_dir=$out/pl
$dpo --loss_type=pl --rank_depth=1 --out_dir=$out/pl_depth_1
$dpo --loss_type=pl --taylor_order=1 --out_dir=$out/pl_taylor_1
$dpo --loss_type=ipo --beta=0.05 --out_dir=$out/ipo
$dpo --loss_type=simpo --beta=2 --margin=0.5 --lr=5e-5 --out_dir=$out/simpo
$dpo --loss_type=orpo --beta=0.5 --nll_coef=1 --out_dir=$out/orpo
END

# PPO against that reward model, and DPO with Preferred-FT as its reference
ppo="config/local/ppo.py --init=$out/sft --reward=$out/reward --pretrain_data=data/local_bpe"
train_parallel <<END
$ppo --out_dir=$out/ppo
config/local/dpo.py --init=$out/preferred_ft --out_dir=$out/dpo_of_preferred_ft
END

"$PY" -m tools.plot table $logs $out/*
"$PY" eval.py reward=$out/reward --data=data/ranked --rows=1000 | tee $logs/reward.txt

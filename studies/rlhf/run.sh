#!/bin/bash
# All stages of RLHF and every preference objective on real ranked rows, at CPU size.
#
#     studies/rlhf/run.sh [FOLDER]
#
# The data is downloaded (README.md); or FOLDER has pretrain.jsonl.gz, sft.jsonl.gz and
# ranked.jsonl.gz. All is written to out/rlhf: the data, the runs, and in logs/ a table of them
# (report.md) with their logs. After an interruption, run it again: finished runs are skipped. Two
# environment variables: JOBS, runs at a time with one thread each (default 2), and PY, the Python
# to use (default .venv/bin/python).
set -euo pipefail

folder=${1:+$(realpath "$1")}
cd "$(dirname "$0")/../.."
PY=${PY:-.venv/bin/python}
JOBS=${JOBS:-2}
out=out/rlhf
mkdir -p $out/logs

# the runs of one set of files must not be taken for those of another
inputs="the downloaded data"
if [ -n "$folder" ]; then
    inputs=$(cat "$folder"/{pretrain,sft,ranked}.jsonl.gz | sha256sum)
fi
[ -s $out/inputs ] || echo "$inputs" > $out/inputs
if [ "$(cat $out/inputs)" != "$inputs" ]; then
    echo "$PWD/$out was made from other files than these: move it away" >&2
    exit 1
fi

prepare() { # prepare NAME [ARGUMENT...]: make the data folder NAME by data.jsonl.prepare, once
    [ -e "$out/data/$1/meta.json" ] || "$PY" -m data.jsonl.prepare --out="$out/data/$1" "${@:2}"
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

"$PY" train.py config/local/pretrain.py --data=$out/data/pretrain --out_dir=$out/pretrain
"$PY" train.py config/local/sft.py --data=$out/data/sft --init=$out/pretrain --out_dir=$out/sft

# the reward model, SFT on the best responses, and every preference objective on the same rows
ranked="--data=$out/data/ranked"
dpo="config/local/dpo.py $ranked --init=$out/sft"
train_parallel <<END
config/local/reward.py $ranked --init=$out/sft --out_dir=$out/reward
config/local/preferred_ft.py $ranked --init=$out/pretrain --out_dir=$out/preferred_ft
$dpo --loss_type=pairs --out_dir=$out/dpo_pairs
$dpo --loss_type=pl --out_dir=$out/pl
$dpo --loss_type=pl --rank_depth=1 --out_dir=$out/pl_depth_1
$dpo --loss_type=pl --taylor_order=1 --out_dir=$out/pl_taylor_1
$dpo --loss_type=ipo --beta=0.05 --out_dir=$out/ipo
$dpo --loss_type=simpo --beta=2 --margin=0.5 --lr=5e-5 --out_dir=$out/simpo
$dpo --loss_type=orpo --beta=0.5 --nll_coef=1 --out_dir=$out/orpo
END

# PPO against that reward model, and DPO with Preferred-FT as its reference
ppo="config/local/ppo.py $ranked --init=$out/sft --reward=$out/reward"
ppo="$ppo --pretrain_data=$out/data/pretrain"
train_parallel <<END
$ppo --out_dir=$out/ppo
config/local/dpo.py $ranked --init=$out/preferred_ft --out_dir=$out/dpo_of_preferred_ft
END

configs=($out/*/config.json)
"$PY" -m tools.plot table $out/logs "${configs[@]%/config.json}"
"$PY" eval.py reward=$out/reward $ranked --rows=1000 | tee $out/logs/reward.txt

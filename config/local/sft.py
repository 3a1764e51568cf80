r"""Fine-tune on instructions: mathematics, shell commands, forum questions.

    python -m data.gsm8k.prepare --val_share=0.1 --out=data/gsm8k_sft
    python -m data.tldr_pages.prepare
    python -m data.stackexchange.prepare
    python -m data.jsonl.prepare data/gsm8k_sft/*.jsonl data/tldr_pages/*.jsonl \
        data/stackexchange/sft/*.jsonl --out=data/local_sft
    python train.py config/local/sft.py

One busy CPU core, 2 to 3 minutes with a vocabulary of 4,096 (studies/rlhf), validation loss 4.30
with another mixture of these sources.
"""

stage = "sft"
out_dir = "out/sft_local"
init = "out/pretrain_local"
data = "data/local_sft"

max_prompt = 160
max_response = 160
batch_size = 32  # rows per step
max_steps = 185  # x 32 = 5,900 of 17,700 rows
optimizer = "muon"
muon_lr = 0.02
lr = 3e-3
warmup_ratio = 0.05
schedule = "linear"
eval_interval = 50
eval_rows = 128
log_interval = 10

"""GRPO on sums: eight samples a prompt, with the prompts and the scorer of addition_online_pl.py.

    python train.py config/demo/addition_grpo.py

After config/demo/addition_sft.py. One CPU core, 5 minutes. The reward is the share of right
samples.
"""

stage = "ppo"
out_dir = "out/addition/grpo"
init = "out/addition/sft"
data = "data/sums/prompts"

advantage = "grpo"
samples_per_prompt = 8
reward = "data.addition.scorer:exact_match"
missing_eos_penalty = 0.0  # an answer that does not end is wrong already
rounds = 24
keep_rounds = 1
max_rows = 1024  # prompts a round, others in each
max_prompt = 32
max_response = 8
gen_batch_size = 1024

kl_coef = 0.0
batch_size = 64  # prompts a step
optimizer = "adamw"
lr = 1.5e-4
schedule = "cosine"  # over all rounds
min_lr_ratio = 0.05
micro_batch_tokens = 8192
eval_interval = 5  # rounds
eval_rows = 500
log_interval = 16
loss_spike_factor = 0.0

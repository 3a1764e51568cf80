"""GRPO (arXiv 2402.03300): a policy gradient with the mean of a group as its baseline.

    torchrun --nproc_per_node=8 train.py config/grpo.py

The same prompts, samples and scorer as config/online_pl.py; after config/sft_gsm8k.py. Not run at
this size yet. Every sample of a prompt has the advantage (R - mean) / std of its group. There is no
value head.

Batch arithmetic: 1,024 prompts x 8 samples a round, 1,024 / 128 = 8 steps of 128 prompts, 166k
packed tokens a step, 21k a rank. With one epoch a sample is at most 7 steps old.

On paper, on 8 x 80 GB GPUs, a round takes 12 s: 10 for the samples, as in online_pl, and 2 for
the steps, which have twice its tokens: 32 rounds in 7 minutes with evaluations.

Dr. GRPO: advantage = "dr_grpo", loss_average = "constant", kl_coef = 0. RLOO: advantage = "rloo",
loss_average = "constant", kl_in = "reward". DAPO's range: clip_range_high = 0.28,
loss_average = "token".
"""

stage = "ppo"
out_dir = "out/grpo"
init = "out/sft_gsm8k_qwen"
data = "data/gsm8k"

advantage = "grpo"
samples_per_prompt = 8
reward = "data.gsm8k.scorer:exact_match"
missing_eos_penalty = 0.0  # an answer that does not end is wrong already
rounds = 32
keep_rounds = 1
max_rows = 1024  # prompts a round, others in each
max_prompt = 256
max_response = 320
gen_batch_size = 128

loss_average = "sequence"  # of each response's mean, as in the paper
kl_in = "loss"
kl_coef = 0.04
clip_range = 0.2
batch_size = 128  # prompts a step
epochs = 1.0
optimizer = "adamw"
lr = 1e-6
schedule = "constant"
eval_interval = 4  # rounds
eval_rows = 256
log_interval = 4

"""Online ranking: eight samples of the policy a prompt, ranked by whether their answer is right.

    torchrun --nproc_per_node=8 train.py config/online_pl.py

After config/sft_gsm8k.py. Not run at this size yet. Right answers tie above wrong ones, which tie
too. A prompt whose samples are all right or all wrong teaches nothing and is left out. Under
Plackett-Luce each right sample competes with all wrong ones.

Batch arithmetic: 1,024 prompts x 8 samples a round; if half of the prompts have both kinds, 512 /
64 = 8 steps of 64 prompts. A prompt of 100 and eight responses of 150 tokens are 1,300 packed
tokens, so 83k tokens a step, 10k a rank.

On paper, on 8 x 80 GB GPUs, a round is 8,192 samples of 150 tokens (128 at a time on a rank: 8
batches of 320 steps of 4 ms, 10 s), one forward pass for the reference and 8 steps (0.66M tokens x
4e9 FLOPs at 40 % of 8 x 989 TFLOP/s, 1 s), and 3 s for validation samples: 32 rounds take 8
minutes.
"""

stage = "spin"
out_dir = "out/online_pl"
init = "out/sft_gsm8k_qwen"
data = "data/gsm8k"

players = ["self:8"]
ranked_by = "data.gsm8k.scorer:exact_match"
rounds = 32
keep_rounds = 1
max_rows = 1024  # prompts a round, others in each
max_prompt = 256
max_response = 320
gen_batch_size = 128

loss_type = "pl"
beta = 0.1
nll_coef = 1.0  # against the fall of the likelihood of right samples
batch_size = 64  # prompts a step
epochs = 1.0
optimizer = "adamw"
lr = 1e-6
schedule = "constant"
eval_interval = 1000  # at the start and the end of each round
eval_rows = 256
log_interval = 4

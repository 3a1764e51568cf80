"""SPIN (arXiv 2401.01335): data > self, four rounds.

    torchrun --nproc_per_node=8 train.py config/spin_k2.py

Not run at this size yet. Estimated on 8 x 80 GB GPUs, a round is: 50k samples of up to 512 tokens
(minutes), one forward pass over samples and data for the reference (10 seconds), and two epochs of
training (1 minute; later 2, with the rows of the round before). Every round starts at ln 2 =
0.6931 + nll_coef x next-token loss.

Data, the rows of config/sft_ultrachat.py:
    python -m data.ultrachat.prepare
"""

stage = "spin"
out_dir = "out/spin_k2"
init = "out/sft_ultrachat"
data = "data/ultrachat"

players = ["data", "self"]
rounds = 4
replay_rounds = 1  # this round's rows and the one before's, as SPIN
max_rows = 50_000
max_prompt = 512
max_response = 512

batch_size = 64  # prompts = 8 x 8 ranks, K responses each
epochs = 2.0
optimizer = "rmsprop"
lr = [5e-7, 5e-7, 1e-7, 1e-7]
beta = [0.1, 0.1, 0.1, 5.0]  # lambda in the paper
warmup_ratio = 0.1
schedule = "linear"
min_lr_ratio = 0.0
nll_coef = 0.2  # SPIN: 0; 1 helps on new sums (studies/verifiable)
eval_interval = 200
eval_rows = 1024
gen_batch_size = 256
log_interval = 10

r"""SPIN's own recipe at 7B (arXiv 2401.01335): data > self from zephyr-7b-sft-full, four rounds.

    python -m data.ultrachat.prepare
    python -m tools.hf import \
        alignment-handbook/zephyr-7b-sft-full@ac6e600eefcce74f5e8bae1035d4f66019e93190 \
        --out=out/zephyr-7b-sft-full --block_size=2048
    torchrun --nproc_per_node=8 train.py config/spin_zephyr_7b.py
    python -m tools.hf export out/spin_zephyr_7b/round_3 --out=out/spin_zephyr_7b_hf

Not run at this size yet: three and a half hours on 8 x 80 GB GPUs, on paper. tests/test_zephyr.py
runs it with a random Mistral of a few thousand parameters on two processes. Every round starts at
ln 2 = 0.6931. The paper's average on the Open LLM Leaderboard is 58.14 before, and 60.80, 62.12,
62.97 and 63.16 after each round.

Memory per GPU while training, 20 GB: float32 weights, gradients and RMSProp's squares of 7.24B
parameters over 8 ranks, 3 x 3.6 GB; one block in bfloat16, 0.4 GB; the embedding tables, 0.5 GB;
for micro-batches of 16k tokens with every block recomputed, 4.3 GB of block inputs and 3 GB
inside one. While sampling, 60 GB: a full bfloat16 copy, 14.5 GB, and 131 kB of keys and values
per token, 17 GB for 128 x 1,024 tokens, twice for a moment.

Time, for rows of 180 prompt tokens and 2 x 330 response tokens at 40 % of 8 x 989 TFLOP/s: a
forward pass of a row is 12 TFLOP, a step with recomputation four of them. A round samples 50k
responses (4 minutes at half of the memory bandwidth), scores its rows (3 minutes, 6 from the
second round on) and trains two epochs on 50k rows (25 minutes; 51 on 100k).

Where the sources disagree (the paper's appendix B; the code and scripts of uclaml/SPIN; the model
cards on the hub), and what is used here:
- Learning rate and beta: the paper has 5e-7, then 1e-7 from round 2, and beta 5.0 in round 3. The
  code's configs have 5e-7 and 0.1 throughout, its scripts the paper's values. Here: the paper's.
- Epochs: paper and cards 2; the code's configs 3, its scripts 6, which stretches the schedule.
  Here 2.
- Length: the paper has 2,048 in all; the code 1,024, of which 512 for the prompt, and samples of
  at most 256 tokens where data may have 512, so that length tells them apart. Here 512 + 512 for
  both.
- Template: the code samples with this one and trains with zephyr's chat template, so its
  reference is off. Here this one for both, after <s>.
- Sampling: the paper's opponent is the model itself. The code samples at temperature 1 and top_p 1
  since February 2024 (before: 0.8 and 0.95). Here temperature 1.
"""

stage = "spin"
out_dir = "out/spin_zephyr_7b"
init = "out/zephyr-7b-sft-full"
data = "data/ultrachat"
template = "<s>{turn}### Instruction: {prompt}\n\n### Response: "

players = ["data", "self"]
rounds = 4
replay_rounds = 1  # from the second round on this and the previous round's rows
max_rows = 50_000
max_prompt = 512
max_response = 512
temperature = 1.0
gen_batch_size = 128

batch_size = (
    64  # prompts = 8 x 8 ranks, 2 responses each: 1,563 steps in round 0, 3,125 in the others
)
micro_batch_tokens = 16384
epochs = 2.0
optimizer = "rmsprop"  # torch's defaults, no weight decay
lr = [5e-7, 5e-7, 1e-7, 1e-7]
beta = [0.1, 0.1, 0.1, 5.0]
warmup_ratio = 0.1
schedule = "linear"
min_lr_ratio = 0.0
dtype = "bfloat16"
activation_checkpointing = 1
fsdp_prefetch = 1

eval_interval = 200
eval_rows = 1024
save_interval = 500
keep_last = 1
log_interval = 10

"""SPIN's own recipe at 7B (arXiv 2401.01335): rounds 0 to 3 of data > self from zephyr-7b-sft-full on 50k first turns of UltraChat.

    python -m data.ultrachat.prepare
    python hf.py import alignment-handbook/zephyr-7b-sft-full@ac6e600eefcce74f5e8bae1035d4f66019e93190 --out=out/zephyr-7b-sft-full --block_size=2048
    torchrun --nproc_per_node=8 train.py config/spin_zephyr_7b.py
    python hf.py export out/spin_zephyr_7b/round_3 --out=out/spin_zephyr_7b_hf --dtype=bfloat16         # for the harness and vLLM

8 x 80 GB GPUs, three hours and a half on paper; not run at this size yet: a random Mistral of a few thousand parameters goes the same way, on two
processes, in tests/test_zephyr.py. Every round starts at ln 2 = 0.6931. The paper's average on the Open LLM Leaderboard: 58.14 before, then 60.80,
62.12, 62.97 and 63.16 after each round.

Memory a GPU: 7.24B float32 weights, their gradients and RMSProp's squares over 8 ranks, 3 x 3.6 GB; one block in bfloat16 at a time, 0.4 GB, the
tables 0.5; of 16k tokens a time, with every block computed again in backward, 4.3 GB of blocks' inputs and 3 GB inside one: 20 GB while it is trained.
While it samples, a whole copy in bfloat16, 14.5 GB, and 131 kB a token of keys and values, 17 GB of 128 x 1,024 tokens, twice for a moment: 60 GB.

Time, for rows of 180 tokens of prompt and 2 x 330 of response at 40 % of 8 x 989 TFLOP/s: a forward pass of a row is 12 TFLOP (bench.py's `flops`),
a step with recomputation four of them. A round samples 50k responses, 4 minutes at half of the memory's 3.35 TB/s, if no launch waits; scores its
rows, 3 minutes, 6 from the second on; trains two epochs on 50k rows, 25 minutes, on 100k, 51.

Where the sources disagree (paper: appendix B; code: uclaml/SPIN, its configs and scripts; cards: the models' on the hub) and what is taken here:
- learning rate and beta: paper 5e-7, then 1e-7 from round 2, and beta 5.0 in round 3; the code's configs have 5e-7 and 0.1 throughout, its scripts
  the paper's values. The paper's.
- epochs: paper and cards 2; the code's configs 3, its scripts 6, so that the schedule falls three times as slowly. 2, and the schedule with them.
- length: paper 2,048 in all; code 1,024, of which the prompt 512, and samples of at most 256 tokens, where data may have 512: length would tell them
  apart. 512 + 512 for both players.
- template: the code samples with this one and trains with zephyr's chat template, so that its reference is off. This one for both, after <s>.
- sampling: the paper's opponent is the model itself; the code samples at temperature 0.8 and top_p 0.95. Temperature 1.
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
prefetch = 1

eval_interval = 200
eval_rows = 1024
save_interval = 500
keep_last = 1
log_interval = 10

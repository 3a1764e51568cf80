r"""SPIN's recipe at 7B with LoRA, on one 80 GB GPU: config/spin_zephyr_7b.py with adapters.

    python -m data.ultrachat.prepare
    python -m tools.hf import \
        alignment-handbook/zephyr-7b-sft-full@ac6e600eefcce74f5e8bae1035d4f66019e93190 \
        --out=out/zephyr-7b-sft-full --block_size=2048
    python train.py config/spin_zephyr_7b_lora.py
    python -m tools.hf export out/spin_zephyr_7b_lora/round_3 --out=out/spin_zephyr_7b_lora_hf
    python -m tools.adapter export out/spin_zephyr_7b_lora --out=out/spin_zephyr_7b_adapter

Not run at this size yet: 24 hours on one 80 GB GPU, on paper. Every round starts at ln 2 = 0.6931.
One adapter is trained in all rounds. The reference of a round is the policy at its start, by stored
log-probabilities. The rank, lora_alpha and the learning rate, ten times the paper's, are not tuned.

Batch arithmetic: 64 prompts of 180 tokens with 2 responses of 330 are 54k packed tokens, four
micro-batches. 50k rows are 1,563 steps in round 0, 100k are 3,125 in the others.

Adapters: r x 81,920 numbers a block (4,096 + 4,096 for queries and the output, 4,096 + 1,024 for
keys and for values, three times 4,096 + 14,336 in the MLP), 168M in 32 blocks at r = 64: 2.3 % of
7.24B.

Memory while training, 28 GB: 14.5 GB of frozen weights in bfloat16; adapters, their gradients and
RMSProp's squares in float32, 3 x 0.67 GB, and 0.3 GB for copies in bfloat16; for micro-batches of
16k tokens with every block recomputed, 4.3 GB of block inputs and 6 GB inside one (3 GB, and what
its adapters add); 0.5 GB of logits. While sampling, 65 GB: the frozen weights, a merged copy of
14 GB (the embedding and the head are shared) and 131 kB of keys and values per token, 17 GB for
128 x 1,024 tokens, twice for a moment. Saving needs 29 GB of the computer's memory: a checkpoint
has the merged weights in float32.

Full fine-tuning would need 12 bytes a weight, 87 GB, before the first activation.

Time, at 40 % of 989 TFLOP/s: a forward pass of a row is 12 TFLOP. A step is three of them, forward,
recomputation and the gradients of activations; the frozen weights have no gradients. That is 0.09 s
a row: two epochs on 50k rows take 2.6 hours, on 100k 5.2. A round samples 50k responses (35
minutes at half of the memory bandwidth) and scores its rows (25 minutes, 50 from the second round
on).
"""

from config.spin_zephyr_7b import *

out_dir = "out/spin_zephyr_7b_lora"

lora_rank = 64
lora_alpha = 32.0
lr = [5e-6, 5e-6, 1e-6, 1e-6]
fsdp_prefetch = 0

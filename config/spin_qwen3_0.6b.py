r"""SPIN (arXiv 2401.01335) with all weights of Qwen3-0.6B, on one 24 GB GPU: data > self.

    python -m data.ultrachat.prepare
    python -m tools.hf import Qwen/Qwen3-0.6B --out=out/qwen3-0.6b --block_size=2048 \
        --chat_template_kwargs='{"enable_thinking": false}'
    python train.py config/spin_qwen3_0.6b.py
    python -m tools.hf export out/spin_qwen3_0.6b/round_3 --out=out/spin_qwen3_0.6b_hf

Not run at this size yet: four hours on one 24 GB GPU of 165 TFLOP/s and 1 TB/s, on paper. Every
round starts at ln 2 = 0.6931.

Batch arithmetic: 32 prompts of 180 tokens with 2 responses of 330 are 27k packed tokens, four
micro-batches of at most 8k. 10k rows x 2 epochs are 625 steps in round 0, 20k are 1,250 in the
others.

Memory while training, 11 GB: 596M weights (28 blocks of 15.7M, and a tied embedding of 151,936 x
1,024), their gradients and RMSProp's squares in float32, 3 x 2.4 GB; copies in bfloat16, 1.2 GB;
the head's gradient in float32, 0.6 GB; for micro-batches of 8k tokens with every block recomputed,
0.5 GB of block inputs and 1 GB inside one; 0.5 GB of logits. Probabilities are kept in half of what
is free. AdamW would need 2.4 GB more. While sampling, 19 GB: weights and copies, 3.6 GB, and 115 kB
of keys and values per token, 7.5 GB for 64 x 1,024 tokens, twice for a moment.

Time: a forward pass of a row is 1.1 TFLOP, a step with recomputation 4.2. At 40 % of 165 TFLOP/s
two epochs on 10k rows take 21 minutes, on 20k 42. A round samples 10k responses (16 minutes at half
of the memory bandwidth) and scores its rows (3 minutes, 5 from the second round on).

With less memory: lora_rank = 64, lr ten times as high. It needs 1.2 GB for frozen weights in
bfloat16 and 0.5 GB for adapters, gradients and squares of 40M numbers, in place of 9 GB.
"""

from config.spin_zephyr_7b import *

out_dir = "out/spin_qwen3_0.6b"
init = "out/qwen3-0.6b"
template = ""  # that of the init

max_rows = 10_000
gen_batch_size = 64
batch_size = 32  # prompts, 2 responses each
micro_batch_tokens = 8192
fsdp_prefetch = 0
eval_rows = 512

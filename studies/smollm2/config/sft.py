"""Fine-tune SmolLM2-135M-Instruct on 774 shell commands, one pass.

    python tests/peers/smollm2.py out/smollm2_hf
    python -m tools.hf import out/smollm2_hf --out=out/smollm2 --block_size=512
    python train.py studies/smollm2/config/sft.py

The README has the commands of the data. One core of a shared Xeon with bfloat16 matrix
instructions, 4 minutes; validation loss from 3.62 to 2.00.
"""

stage = "sft"
out_dir = "out/commands/sft"
init = "out/smollm2"
data = "data/commands"
dtype = "bfloat16"

max_prompt = 96
max_response = 48
batch_size = 32  # rows, 24 steps a pass
optimizer = "adamw"
lr = 1e-4
warmup_ratio = 0.1
schedule = "linear"
eval_interval = 1000  # at the start and the end
eval_rows = 256
log_interval = 5

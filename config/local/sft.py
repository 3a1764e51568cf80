"""Fine-tune the local model on all of the local instructions: mathematics, commands, health, and the answers that ranked rows are about.

python -m data.jsonl.prepare ../shared/data/sft.jsonl.gz --out=data/local_sft
python train.py config/local/sft.py         one busy CPU core, 18 minutes with a vocabulary of 4,096 (`make rlhf`), validation loss 4.29
"""

from config.local.sft_gsm8k import *

out_dir = "out/sft_local"
data = "data/local_sft"
max_steps = 185  # x 32 = 5,900 of 17,700 rows

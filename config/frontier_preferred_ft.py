"""The frontier's Preferred-FT: SFT on the best of the three samples.

python train.py config/frontier_preferred_ft.py         20 s on a core, validation loss 4.66
"""

from config.frontier_dpo import *

stage = "sft"
out_dir = "out/frontier/preferred_ft"

"""The frontier's Preferred-FT: SFT on the best of the three samples.

python train.py studies/frontier/config/preferred_ft.py         20 s on a core, validation loss 4.66
"""

from studies.frontier.config.dpo import *

stage = "sft"
out_dir = "out/frontier/preferred_ft"

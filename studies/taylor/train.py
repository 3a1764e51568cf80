"""Train a run of the T_n study: the shared trainer with the study's model, losses and evaluation.

    python -m studies.taylor.train studies/taylor/config/later.py --taylor_order=2

All settings of `train.py` apply; the stage is sft (or pretrain). `--help` lists them.
"""

import sys
from dataclasses import dataclass, replace

import train
from nanospin import elastic
from nanospin.config import Config, require
from studies.taylor.calibration import evaluate
from studies.taylor.losses import token_objective
from studies.taylor.model import TaylorGPT


@dataclass
class TaylorConfig(Config):
    # ---- token losses instead of taylor_order; at most one is set
    focal: float = 0.0  # gamma of focal loss
    token_label_smoothing: float = 0.0  # weight of the uniform distribution
    confidence_penalty: float = 0.0  # weight of the negative entropy

    def __post_init__(self):
        require(
            self.stage in ("sft", "pretrain"),
            f"studies.taylor.train has stage sft and pretrain, not {self.stage}",
        )
        losses = ["taylor_order", "focal", "token_label_smoothing", "confidence_penalty"]
        used = [name for name in losses if getattr(self, name)]
        require(len(used) <= 1, f"{' and '.join(used)} are different token losses: set one")
        require(
            self.token_label_smoothing < 0.5,
            f"token_label_smoothing must be in [0, 0.5), got {self.token_label_smoothing}",
        )
        require(
            not self.label_smoothing,
            "label_smoothing is of rankings; the token loss is token_label_smoothing",
        )


def main(argv: list[str]):
    sft, pretrain = train.STAGES["sft"], train.STAGES["pretrain"]
    stages = {
        "sft": replace(sft, objective=token_objective, evaluate=evaluate),
        "pretrain": replace(pretrain, objective=token_objective),
    }
    train.main(argv, config_class=TaylorConfig, model_class=TaylorGPT, stages=stages)


if __name__ == "__main__":
    sys.exit(elastic.run(main, sys.argv[1:]))

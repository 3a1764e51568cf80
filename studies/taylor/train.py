"""Train a run of the T_n study: the shared trainer with the study's model, losses and evaluation.

    python -m studies.taylor.train studies/taylor/config/later.py --taylor_order=2

All settings of `train.py` apply; the stage is sft (or pretrain). `--help` lists them.
"""

import sys
from dataclasses import dataclass, replace

import rollout
import train
from nanospin import elastic
from nanospin.config import Config, require
from studies.taylor.calibration import evaluate
from studies.taylor.losses import count_units, token_objective
from studies.taylor.model import TaylorGPT


@dataclass
class TaylorConfig(Config):
    # ---- token losses instead of taylor_order; at most one is set
    focal: float = 0.0  # gamma of focal loss
    token_label_smoothing: float = 0.0  # weight of the uniform distribution
    confidence_penalty: float = 0.0  # weight of the negative entropy

    # ---- evaluation
    fit_temperature: bool = True  # calibration and fitted temperatures too: eight times the work

    def __post_init__(self):
        require(
            self.stage in ("sft", "pretrain"),
            f"studies.taylor.train has stage sft and pretrain, not {self.stage}",
        )
        require(
            self.stage == "sft" or not self.model.get("write_up"),
            "write_up, a model of the write-up, needs stage sft",
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


FIRST_VERSION_PADS = 9  # that the first version feeds at the end of a full row


def collect(cfg, round_id: int, model, enc, device, say):
    """Encoded rows; those of a model of the write-up as the write-up feeds them."""
    train_rows, val_rows, report = rollout.collect(cfg, round_id, model, enc, device, say)
    if not model.config.write_up:
        return train_rows, val_rows, report
    sides = []
    for rows in (train_rows, val_rows):
        side = []
        for row in rows:
            ids = as_fed(row["responses"][0], enc.eot_token, model.config)
            if len(ids) > 1:
                side.append(row | {"responses": [ids]})
        sides.append(side)
    return *sides, report


def as_fed(ids: list[int], eot: int, config) -> list[int]:
    """The tokens of a text as the write-up feeds them; each but the first is a label.

    later: without end-of-text. first: cut to block_size - 9 tokens and padded with end-of-text to
    block_size; the padding is fed, and its labels count.
    """
    if ids[-1] == eot:
        ids = ids[:-1]
    if config.write_up == "later":
        return ids
    ids = ids[: config.block_size - FIRST_VERSION_PADS]
    return ids + [eot] * (config.block_size - len(ids))


def main(argv: list[str]):
    sft, pretrain = train.STAGES["sft"], train.STAGES["pretrain"]
    stages = {
        "sft": replace(
            sft,
            collect=collect,
            objective=token_objective,
            evaluate=evaluate,
            num_units=count_units,
        ),
        "pretrain": replace(pretrain, objective=token_objective),
    }
    train.main(argv, config_class=TaylorConfig, model_class=TaylorGPT, stages=stages)


if __name__ == "__main__":
    sys.exit(elastic.run(main, sys.argv[1:]))

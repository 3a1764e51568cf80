"""TensorBoard: the metrics of W&B (nanospin/wandb_logger.py), at the same steps, without tables.

Each start of a run writes the records of metrics.jsonl from the first one into a new event file,
and removes those of earlier starts. So every record is there once, also after a kill, and also if
earlier starts had `tensorboard` off.
"""

import contextlib
import glob
import os
import time

from data.files import printable
from nanospin import distributed
from nanospin.wandb_logger import error_text, wandb_names


def tensorboard_sender(cfg):
    """A context manager whose value is a function that sends a record, or does nothing. It must be
    called with every record of the run, from the first."""
    if not cfg.tensorboard or distributed.rank() != 0:
        return contextlib.nullcontext(lambda record: None)
    return TensorboardSender(cfg)


class TensorboardSender:
    """Writes a run's records to out_dir/tensorboard. A missing package or a full disk is reported
    in one line and never ends the run."""

    def __init__(self, cfg):
        self.cfg = cfg
        self.folder = os.path.join(cfg.out_dir, "tensorboard")
        self.writer = None  # None: nothing is written
        self.round_id = 0  # of the last record
        self.step = 0  # optimizer steps of this round, up to the last record
        self.steps_before = 0  # optimizer steps of the rounds before

    def __enter__(self):
        try:
            from torch.utils.tensorboard import SummaryWriter

            remove_event_files(self.folder)
            # step 0: a TensorBoard that is open forgets what it read before
            self.writer = SummaryWriter(self.folder, purge_step=0)
        except ImportError:
            report(
                "the package is missing: pip install tensorboard, then the same command writes all "
                "steps; training continues without it"
            )
        except Exception as e:  # whatever the package raises
            self.give_up(e)
        return self.send

    def __exit__(self, error_type, error, traceback):
        if self.writer is None:
            return
        try:
            self.writer.flush()
            time.sleep(0.1)  # the package's thread notes an error only after `flush` has returned
            self.writer.flush()
            self.writer.close()
        except Exception as e:  # whatever the package raises
            report(f"{error_text(e)}; steps are missing, the same command writes all of them")

    def send(self, record: dict):
        if self.writer is None or record["kind"] == "warning":
            return
        if record["round"] > self.round_id:
            self.round_id = record["round"]
            self.steps_before += self.step
        self.step = record["step"] + 1 if record["kind"] == "step" else record["step"]
        try:
            for name, value in wandb_names(record, self.cfg.stage).items():
                self.writer.add_scalar(name, value, self.steps_before + self.step)
            self.writer.add_scalar("round", self.round_id, self.steps_before + self.step)
        except Exception as e:  # whatever the package raises
            self.give_up(e)

    def give_up(self, error: Exception):
        self.writer = None
        report(f"{error_text(error)}; training continues without it")


def remove_event_files(folder: str):
    """Remove the event files that earlier starts of the run wrote."""
    for path in glob.glob(os.path.join(glob.escape(folder), "events.out.tfevents.*")):
        if os.path.isfile(path):
            os.unlink(path)


def report(text: str):
    print(printable(f"tensorboard: {text}"), flush=True)

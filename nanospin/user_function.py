"""Calls of a scorer that a user wrote: whatever it does is one problem with a name."""

import contextlib
import copy
import math
import os
import traceback

import torch

from data.files import shorten
from data.rows import is_score


def call_once(function, row: dict, text: str) -> tuple[float, str, str]:
    """(score, problem, traceback) of one call. The last two are "" if there was no problem."""
    score, problem, shown = math.nan, "", ""
    folder = os.getcwd()
    try:
        with kept_torch_settings():
            value = function(copy.deepcopy(row), text)  # it may change its row
        score = as_number(value)
        if not is_score(score):
            problem = f"gave {shorten(value)}, not a finite number below 1e30"
    except (Exception, SystemExit) as e:
        problem = f"raised {type(e).__name__}: {shorten(e, str)}"
        trace = e.__traceback__.tb_next  # without this function
        shown = "".join(traceback.format_exception(type(e), e, trace))
    finally:  # also if a signal has ended the call
        has_moved = os.getcwd() != folder
        os.chdir(folder)  # out_dir may be relative
    if has_moved:
        problem = problem or "changed the current folder, which it must not"
    return score, problem, shown


@contextlib.contextmanager
def kept_torch_settings():
    """Put back what changes the numbers of training: a function may load a model at its first call,
    and a resumed run may not call it again."""
    dtype, precision = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    threads = torch.get_num_threads()
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_float32_matmul_precision(precision)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


def as_number(value) -> float:
    """What a function returned as a float; NaN if it is not a number."""
    if isinstance(value, (str, bytes)):
        return math.nan
    try:
        return float(value)
    except Exception:  # of whatever type it is
        return math.nan

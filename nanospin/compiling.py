"""Functions compiled by torch.compile for a GPU, beside the blocks of the model."""

import functools

import torch


def raise_limit_of_graphs():
    """Dynamo compiles a function at most 8 times by default, and then runs it uncompiled."""
    torch._dynamo.config.recompile_limit = 64


@functools.cache
def compile_dynamic(function, dynamic: bool | None = True):
    """A function, compiled for any length. This holds in generate() too, which runs everything else
    eagerly.

    dynamic: every size is a variable; None: those that were seen to change. Beyond Dynamo's limit
    of graphs the function would silently run uncompiled, and attention hold all scores. Sizes that
    happen to be equal are not taken to be always equal: as many queries as keys would be compiled
    as a special case.
    """
    raise_limit_of_graphs()
    torch.fx.experimental._config.use_duck_shape = False
    return torch.compiler.set_stance("default")(torch.compile(function, dynamic=dynamic))

"""Fast single-token steps: weights in oneDNN's layout on a CPU, CUDA graphs on a GPU."""

import contextlib
import sys
from collections.abc import Callable

import torch

from nanospin.attention import small_matmuls

# ---- CPU


@contextlib.contextmanager
def prepacked_weights(model, rows: int):
    """Make the model's matmuls on a CPU fast for `rows` tokens per step, inside this context.

    oneDNN reorders the weights in every call; here they are reordered once. GELU is fused into its
    matmul, and attention uses `small_matmuls`. The reordered copies double the memory of the
    weights. Does nothing on a GPU, for FSDP2 models and for dtypes that oneDNN does not support.
    """
    if not can_prepack(model):
        yield
        return
    replaced = fast_methods(model, rows)
    try:
        for module, name, method in replaced:
            setattr(module, name, method)
        # inference_mode saves some bookkeeping in every operation
        with small_matmuls(), torch.inference_mode():
            yield
    finally:
        for module, name, _ in replaced:
            module.__dict__.pop(name, None)


def can_prepack(model) -> bool:
    weight = model.wte.weight
    if weight.device.type != "cpu" or is_fsdp(model) or not torch.backends.mkldnn.is_available():
        return False
    dtype = model.autocast_dtype or weight.dtype
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32


def is_fsdp(model) -> bool:
    """Whether FSDP2 shards the model. Its weights do not tell: some are whole between two steps."""
    return hasattr(model, "reshard")


def fast_methods(model, rows) -> list[tuple]:
    """(module, name of the method, its replacement) for the LM head and every linear layer."""
    dtype = model.autocast_dtype or model.wte.weight.dtype

    def prepack(weight, bias=None, activation=("none", [], "")):
        weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype), rows)
        bias = None if bias is None else bias.detach().to(dtype)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x.to(dtype), weight, bias, *activation)

    if model.config.tie_embeddings:
        head = prepack(model.wte.weight)
    else:
        head = prepack(model.lm_head.weight, model.lm_head.bias)
    replaced = [(model, "head", head)]
    for block in model.h:
        for module in block.modules():
            # not a subclass: it may do more than a linear layer
            if type(module) is torch.nn.Linear:
                replaced.append((module, "forward", prepack(module.weight, module.bias)))
        if model.config.mlp == "gelu" and type(block.mlp.c_fc) is torch.nn.Linear:
            fc = block.mlp.c_fc
            fc_gelu = prepack(fc.weight, fc.bias, ("gelu", [], "tanh"))
            replaced.append((block.mlp, "fc_gelu", fc_gelu))
    return replaced


# ---- GPU

GRAPHS = {"cuda"}  # devices on which a step is captured as a CUDA graph


class DecodeStep:
    """Calling it decodes one more token for each of the B rows of a KV cache, in place.

    ids (B,): each row's last token, which is not in the cache yet; replaced by the new one.
    pos (B,): its position in its sequence; num_sampled (B,): tokens sampled so far. Both advance.
    sample(logits (B, V), num_sampled) -> ids (B,).

    On a GPU a step launches hundreds of kernels. It is captured as a CUDA graph and replayed with a
    single launch until the cache has to grow. An FSDP2 model is not captured: its ranks communicate
    within a step.
    """

    def __init__(self, model, cache, ids, pos, num_sampled, sample: Callable):
        self.model = model
        self.cache = cache
        self.ids = ids
        self.pos = pos
        self.num_sampled = num_sampled
        self.sample = sample
        self.replay = None

    def __call__(self):
        if self.replay is not None and self.cache.room():
            self.replay()
            self.cache.ends = [end + 1 for end in self.cache.ends]
            return
        self.run()
        self.replay = None
        if self.ids.device.type in GRAPHS and self.cache.room() and not is_fsdp(self.model):
            ends = self.cache.ends
            self.replay = capture_cuda_graph(self.run)
            self.cache.ends = ends  # capturing executes the Python code, but no kernel

    def run(self):
        """One step. Rows that have ended are decoded too, so their positions are clamped."""
        pos = self.pos.clamp(max=self.model.config.block_size - 1)
        logits = self.model(self.ids, pos=pos, cache=self.cache)  # (B, V)
        self.ids.copy_(self.sample(logits, self.num_sampled))
        self.pos += 1
        self.num_sampled += 1


def capture_cuda_graph(work: Callable) -> Callable | None:
    """Capture what work() does to tensors; returns a function that does it again.

    work() must have run once before. If it does something that a graph cannot hold, this prints a
    line, turns graphs off for the process and returns None.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        # thread_local: other threads, such as one that saves a checkpoint, may use CUDA meanwhile
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            work()
    except RuntimeError as e:
        if torch.cuda.current_stream() != stream:
            # The capture could not be ended. The allocator and the random state are unusable now.
            raise
        GRAPHS.clear()
        message = str(e).splitlines()[0]
        print(f"sampling without CUDA graphs ({message})", file=sys.stderr, flush=True)
        return None
    return graph.replay

"""lm-evaluation-harness on a run of ours, without an export; every option of its command line is there:

    python tests/peers/adapter.py run --model nanospin --model_args run=out/demo/sft --tasks arc_easy --apply_chat_template

Log-probabilities come from eval.py's batches, with the choices of a question behind one prompt, and text from sample.py.
"""

import itertools
import json
import os
import sys

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)

from nanospin import checkpoint
import eval
from data.batch import batch_rows
from data import tokenizer
from data.template import split_template, encode_framed
from loss import sequence_logprobs
from sample import generate, response_text


@register_model("nanospin")
class Run(TemplateLM):
    def __init__(self, run, device="cpu", tokens=8192, **ignored):
        """run: a run folder or a checkpoint in it; tokens: so many are scored at a time, whose logits fit into memory."""
        super().__init__()
        device = (
            device if torch.cuda.is_available() else "cpu"
        )  # the command line's default is cuda
        self.model, self.enc, meta = checkpoint.load_model(run, device)
        self.template, self.tokens, self._device = (
            meta["config"]["template"],
            int(tokens),
            torch.device(device),
        )

    eot_token_id = property(lambda self: self.enc.eot_token)
    prefix_token_id = property(
        lambda self: tokenizer.specials(self.enc).get(tokenizer.begin(self.enc), self.enc.eot_token)
    )
    max_length = property(lambda self: self.model.config.block_size)
    tokenizer_name = property(lambda self: "")  # of the harness's cache of requests

    def tok_encode(self, string, add_special_tokens=None, **ignored):
        """As an export's tokenizer: special tokens are tokens, and its own beginning of a text stands before it once."""
        begin = (
            ""
            if add_special_tokens is False or string.startswith(tokenizer.begin(self.enc))
            else tokenizer.begin(self.enc)
        )
        return encode_framed(self.enc, begin + string, "", "", "start")

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        """What was said as one text, as the chat template of an export has it."""
        begin, before, after, end = split_template(self.template)
        for m in chat_history:
            if m["role"] not in ("user", "assistant"):
                raise SystemExit(f"roles are user and assistant, not {m['role']}")
        said = begin + "".join(
            before + m["content"] + after if m["role"] == "user" else m["content"] + end
            for m in chat_history
        )
        return said if add_generation_prompt else said.removesuffix(end)

    def _loglikelihood_tokens(self, requests, **ignored):
        """[(the texts, ids of a context, of a continuation)] -> [(log-probability, whether greedy sampling says just that)]"""
        asked = [
            (context[-(self.max_length + 1 - len(continuation)) :], continuation)
            for _, context, continuation in requests
        ]
        rows = []
        for context, group in itertools.groupby(asked, key=lambda pair: pair[0]):
            continuations = [continuation for _, continuation in group]
            rows.append(
                {"prompt": context, "responses": continuations, "ranks": [0] * len(continuations)}
            )

        def pick(logits, batch):  # (m, V), of the continuations' places alone
            B, K = batch["present"].shape
            logps = logits.log_softmax(-1).gather(-1, batch["targets"][:, None])[:, 0]
            other = (logits.argmax(-1) != batch["targets"]).float()
            sums, others = (
                sequence_logprobs(each, batch["seq"], B * K).view(B, K).tolist()
                for each in (logps, other)
            )
            return [[(logp, n == 0) for logp, n in zip(*both)] for both in zip(sums, others)]

        found = eval.map_batches(
            self.model, rows, self.tokens, self._device, batch_rows, pick, whole=True
        )
        return [pair for row, pairs in zip(rows, found) for pair in pairs[: len(row["responses"])]]

    def loglikelihood_rolling(self, requests, **ignored):
        logps = []
        for (text,) in (request.args for request in requests):
            cut = utils.get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, 1
            )
            logps.append(
                sum(
                    logp
                    for logp, _ in self._loglikelihood_tokens(
                        [(None, *utils.make_disjoint_window(pair)) for pair in cut]
                    )
                )
            )
        return logps

    def generate_until(self, requests, **ignored):
        kinds, texts = {}, {}
        for i, request in enumerate(requests):
            kinds.setdefault(json.dumps(request.args[1]), []).append(i)
        for kind, which in kinds.items():
            asked = normalize_gen_kwargs(json.loads(kind))
            room, stops = (
                self.max_length - asked["max_gen_toks"],
                handle_stop_sequences(asked["until"], eos=None),
            )
            if room < 1:
                raise SystemExit(
                    f"max_gen_toks {asked['max_gen_toks']} leaves no room for a prompt in block_size {self.max_length}"
                )
            prompts = [self.tok_encode(requests[i].args[0])[-room:] for i in which]
            new = generate(
                self.model,
                prompts,
                asked["max_gen_toks"],
                asked.get("temperature", 0.0),
                asked.get("top_k"),
                asked.get("top_p"),
                self.eot_token_id,
                torch.Generator().manual_seed(0),
                numbers=which,
            )
            texts |= {
                i: postprocess_generated_text(response_text(self.enc, ids), stops, None)
                for i, ids in zip(which, new)
            }
        return [texts[i] for i in range(len(requests))]


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()

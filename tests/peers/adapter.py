"""lm-evaluation-harness on a run, without an export. All options of its command line work:

    python tests/peers/adapter.py run --model nanospin --model_args run=out/demo/sft \\
        --tasks arc_easy --apply_chat_template

Log-probabilities are computed in eval.py's batches, with all choices of a question after one
prompt. Texts are sampled by sample.py.
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

from data import tokenizer
from data.batch import batch_rows
from data.chat_template import Chat, chat_text
from data.template import encode_pieces
from eval import map_batches
from loss import sequence_logprobs
from model import GPT
from sample import generate, response_text


@register_model("nanospin")
class NanoSpinLM(TemplateLM):
    def __init__(self, run, device="cpu", tokens=8192, **ignored):
        """run: a run folder or a checkpoint. tokens: scored at a time, limited by their logits."""
        super().__init__()
        if not torch.cuda.is_available():  # the command line's default is cuda
            device = "cpu"
        self.model, self.enc, meta = GPT.from_checkpoint(run, device)
        self.template = meta["config"]["template"]
        self.tokens = int(tokens)
        self._device = torch.device(device)

    @property
    def eot_token_id(self):
        return self.enc.eot_token

    @property
    def prefix_token_id(self):
        bos = tokenizer.begin(self.enc)
        return tokenizer.specials(self.enc).get(bos, self.enc.eot_token)

    @property
    def max_length(self):
        return self.model.config.block_size

    @property
    def tokenizer_name(self):  # a key of the harness's cache of requests
        return ""

    def tok_encode(self, string, add_special_tokens=None, **ignored):
        """The ids that an export's tokenizer gives: special tokens are recognised, bos is added."""
        bos = tokenizer.begin(self.enc)
        if add_special_tokens is False or string.startswith(bos):
            bos = ""
        return encode_pieces(self.enc, [bos + string], "start")

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        """The text that the chat template of an export gives."""
        messages = list(chat_history)
        system = messages.pop(0)["content"] if messages[0]["role"] == "system" else ""
        contents = [message["content"] for message in messages]
        turns = list(zip(contents[::2], contents[1::2]))
        if len(contents) % 2:
            return chat_text(self.template, Chat(contents[-1], None, turns, system))
        return chat_text(self.template, Chat(*turns[-1], turns[:-1], system))

    def _loglikelihood_tokens(self, requests, **ignored):
        """[(texts, context ids, continuation ids)] -> [(log-probability, whether it is greedy)]."""
        pairs = []
        for _, context, continuation in requests:
            room = self.max_length + 1 - len(continuation)
            pairs.append((context[-room:], continuation))
        rows = []
        for context, group in itertools.groupby(pairs, key=lambda pair: pair[0]):
            continuations = [continuation for _, continuation in group]
            ranks = [0] * len(continuations)
            rows.append({"prompt": context, "responses": continuations, "ranks": ranks})

        scored = map_batches(
            self.model, rows, self.tokens, self._device, batch_rows, self.score_responses
        )
        results = []
        for row, scores in zip(rows, scored):
            results += scores[: len(row["responses"])]
        return results

    def score_responses(self, batch):
        """For each row, (log-probability, whether it is greedy) of each response."""
        B, K = batch.response_mask.shape
        logits = self.model(batch.idx, **batch.layout())  # (m, V)
        logps = logits.log_softmax(-1).gather(-1, batch.targets[:, None])[:, 0]
        not_greedy = (logits.argmax(-1) != batch.targets).float()
        logps = sequence_logprobs(logps, batch.response_index, B * K).view(B, K).tolist()
        num_not_greedy = (
            sequence_logprobs(not_greedy, batch.response_index, B * K).view(B, K).tolist()
        )
        scores = []
        for row_logps, row_counts in zip(logps, num_not_greedy):
            scores.append([(logp, count == 0) for logp, count in zip(row_logps, row_counts)])
        return scores

    def loglikelihood_rolling(self, requests, **ignored):
        results = []
        for request in requests:
            (text,) = request.args
            windows = utils.get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, 1
            )
            pairs = [utils.make_disjoint_window(window) for window in windows]
            scores = self._loglikelihood_tokens([(None, *pair) for pair in pairs])
            results.append(sum(logp for logp, _ in scores))
        return results

    def generate_until(self, requests, **ignored):
        """Requests with the same settings are sampled together."""
        groups = {}
        for i, request in enumerate(requests):
            settings = json.dumps(request.args[1])
            groups.setdefault(settings, []).append(i)
        texts = [""] * len(requests)
        for settings, indices in groups.items():
            prompts = [requests[i].args[0] for i in indices]
            for i, text in zip(indices, self.sample(prompts, indices, json.loads(settings))):
                texts[i] = text
        return texts

    def sample(self, prompts, request_ids, settings):
        """A text for each prompt."""
        settings = normalize_gen_kwargs(settings)
        max_new_tokens = settings["max_gen_toks"]
        room = self.max_length - max_new_tokens
        if room < 1:
            raise SystemExit(
                f"max_gen_toks {max_new_tokens} leaves no room for a prompt in block_size"
                f" {self.max_length}"
            )
        sampled = generate(
            self.model,
            [self.tok_encode(prompt)[-room:] for prompt in prompts],
            max_new_tokens,
            settings.get("temperature", 0.0),
            settings.get("top_k"),
            settings.get("top_p"),
            self.eot_token_id,
            torch.Generator().manual_seed(0),
            request_ids=request_ids,
        )
        stops = handle_stop_sequences(settings["until"], eos=None)
        texts = [response_text(self.enc, ids, "{prompt}") for ids in sampled]
        return [postprocess_generated_text(text, stops, None) for text in texts]


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()

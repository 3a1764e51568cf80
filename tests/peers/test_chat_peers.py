"""Prompts and answers against transformers' apply_chat_template, and TRL's chat templates."""

import glob
import os

import pytest

from data import tokenizer
from data.chat_template import follow, read_chat_template
from data.template import end_token, prompt_ids
from tests.chat_templates import PUBLISHED
from tests.peers import smollm2
from tests.tokenizers_like import byte_level, sentencepiece
from tools.hf import compare_chat, with_stop_tokens

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed; make test-peers installs it"
)
trl = pytest.importorskip("trl", reason="trl is not installed; make test-peers installs it")
transformers.logging.set_verbosity_error()

# What the templates that TRL ships are refused for. The others are followed.
REFUSED_OF_TRL = {
    "the prompt for an answer ends in": {
        "deepseek_r1_distill",
        "deepseekv3",
        "nemotron_3_5_lightning",
    }
    | {"nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra"},
    "it writes today's date": {"llama3_2"},
    "it drops thoughts": {"lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl"},
    "no special token ends an answer": {"glm4moe", "gptoss", "muse_glimmer"},
    "each prompt and answer once": {"idefics3", "smolvlm"},
    "it raises": {"llava_next"},
    "it writes .*</think>": {"qwen3_5_nothink_training"},
}


def load(folder):
    enc = tokenizer.load(os.path.join(folder, "tokenizer.json"))
    return enc, read_chat_template(folder, enc)


@pytest.mark.parametrize("name", [name for name in PUBLISHED if PUBLISHED[name].followed])
def test_published_chat_templates(name, tmp_path):
    """The ids of 24 prompts, answers, several turns and system messages are transformers'."""
    model = PUBLISHED[name]
    folder = str(tmp_path)
    if model.sentencepiece:
        sentencepiece(folder, model.sentencepiece, model.source, model.specials)
    else:
        byte_level(folder, model.specials, model.source, model.eos, model.bos, name == "Phi-3")
    enc, _ = load(folder)
    enc = with_stop_tokens(folder, enc, model.followed)
    compare_chat(folder, enc, model.followed, model.kwargs)


def trl_templates():
    pattern = os.path.join(os.path.dirname(trl.__file__), "chat_templates", "*.jinja")
    return {os.path.basename(path).removesuffix(".jinja"): path for path in glob.glob(pattern)}


def test_trl_has_templates():
    assert len(trl_templates()) > 60


@pytest.mark.parametrize("name", sorted(trl_templates()))
def test_chat_templates_of_trl(name, tmp_path):
    """Followed with transformers' ids, or refused for the known reason."""
    with open(trl_templates()[name], encoding="utf-8") as f:
        source = f.read()
    ends = ["<|im_end|>", "<end_of_turn>", "<|eot_id|>", "<turn|>", "<|END_OF_TURN_TOKEN|>"]
    ends += ["<｜end▁of▁sentence｜>", "<|end|>"]
    eos = next((end for end in ends if end in source), "</s>")
    folder = byte_level(str(tmp_path), [], source, eos, "<s>")
    enc, chat_template = load(folder)
    reasons = [
        reason
        for reason, names in REFUSED_OF_TRL.items()
        if name in names or name.removesuffix("_training") in names
    ]
    if reasons:
        with pytest.raises(SystemExit, match=reasons[0]):
            follow(chat_template, enc, folder)
        return
    template = follow(chat_template, enc, folder)
    compare_chat(folder, enc, template)


def test_smollm2():
    """A real tokenizer. Its answers that begin with a line break are joined with the prompt's."""
    try:
        folder = smollm2.model_folder()
    except OSError as e:
        pytest.skip(str(e))
    enc, chat_template = load(folder)
    template = follow(chat_template, enc, folder)
    compare_chat(folder, enc, template)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " Who? "},
        {"role": "assistant", "content": "I."},
        {"role": "user", "content": "Why?\n"},
    ]
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    ours = prompt_ids(enc, template, "Why?\n", [(" Who? ", "I.")], "Be brief.")
    assert ours == ids.input_ids
    assert end_token(enc, template) == "<|im_end|>"

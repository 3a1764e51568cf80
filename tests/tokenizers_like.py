"""Small tokenizers built like those of other models, for tests."""

import json
import os

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

with open("README.md", encoding="utf-8") as readme:
    TEXTS = [
        readme.read(),
        "the loss of a model falls when it reads what people write and stops at the end"
        " 0123456789 naïve 日本語",
    ]
CHATML = (
    "{% for m in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}"
    "{% endif %}"
    "{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}\n"
    "{% if m['role'] == 'user' %}\n"
    "{{ '<|user|>\n' + m['content'] + eos_token }}\n"
    "{% elif m['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + m['content'] + eos_token }}\n"
    "{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n"
    "{{ '<|assistant|>' }}\n"
    "{% endif %}\n"
    "{% endfor %}"
)


def chatml(folder):
    """Like SmolLM's and Qwen's: a byte-level BPE with single digits, turns in special tokens, a
    default system message."""
    return byte_level(folder, ["<|im_start|>"], CHATML, bos="<|im_start|>", eos="<|im_end|>")


def byte_level(folder, specials, chat, eos, bos="", strips=False):
    """A byte-level BPE with single digits, with special tokens and a chat template.

    strips: its special tokens take the white space after them, as Phi-3's do.
    """
    specials = list(dict.fromkeys(["<|endoftext|>", *specials, eos, *([bos] if bos else [])]))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        special_tokens=[AddedToken(name, special=True, rstrip=strips) for name in specials],
    )
    bpe.train_from_iterator(TEXTS, trainer)
    bpe.add_tokens(["<think>", "</think>"])
    tokens = {"eos_token": eos} | ({"bos_token": bos} if bos else {})
    return save(bpe, folder, chat, **tokens)


def sentencepiece(folder, scheme="legacy", chat=ZEPHYR, specials=(), strips=False):
    """Like Llama's and Mistral's: a BPE that falls back to bytes, with <s> before every text.

    scheme: "legacy": a space before a text and after a special token; "first": before the text
    only; "never". strips: `specials` take the white space after them, as Phi-3's do.
    """
    vocab, merges = learn_words()
    bpe = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    decode = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if scheme == "legacy":
        bpe.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    if scheme != "never":
        decode.append(decoders.Strip(" ", 1, 0))
    bpe.decoder = decoders.Sequence(decode)
    special = ("<unk>", "<s>", "</s>", *specials)
    added = []
    for word in special:
        takes_space = strips and word in specials
        added.append(AddedToken(word, normalized=False, special=True, rstrip=takes_space))
    bpe.add_special_tokens(added)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return save(bpe, folder, chat, bos_token="<s>", eos_token="</s>", add_bos_token=True)


def learn_words():
    """(vocabulary, merges) of a BPE: special tokens, bytes, then what it learns from TEXTS."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Metaspace()
    bpe.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=240, show_progress=False))
    learned = json.loads(bpe.to_str())["model"]
    words = ["<unk>", "<s>", "</s>"]
    words += [f"<0x{b:02X}>" for b in range(256)]
    words += sorted(learned["vocab"], key=learned["vocab"].get)
    vocab = {word: i for i, word in enumerate(words)}
    return vocab, [tuple(pair) for pair in learned["merges"]]


def save(bpe, folder, chat, **config):
    """Write tokenizer.json and tokenizer_config.json. Returns the folder."""
    os.makedirs(folder, exist_ok=True)
    bpe.save(os.path.join(folder, "tokenizer.json"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if chat:
        config["chat_template"] = chat
    with open(os.path.join(folder, "tokenizer_config.json"), "w", encoding="utf-8") as f:
        json.dump(config, f)
    return str(folder)

"""Tokenizers built as other models have theirs, small: what tests import in their place."""

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

TEXTS = [
    open("README.md", encoding="utf-8").read(),
    "the loss of a model falls when it reads what people write and stops at the end 0123456789 naïve 日本語",
]
CHATML = (
    "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}\n{% if m['role'] == 'user' %}\n{{ '<|user|>\n' + m['content'] + eos_token }}\n{% elif m['role'] == 'assistant' %}\n"
    "{{ '<|assistant|>\n'  + m['content'] + eos_token }}\n{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
)


def chatml(folder):
    """SmolLM's and Qwen's kind: byte-level BPE that takes digits one by one, turns in special tokens, a system message."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=400,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        ),
    )
    return finish(bpe, folder, CHATML, bos_token="<|im_start|>", eos_token="<|im_end|>")


def sentencepiece(folder, scheme="legacy", chat=ZEPHYR):
    """Llama's and Mistral's kind: BPE that falls back to bytes, a space before a text and after a special token ("legacy"), or before
    the text alone ("first"), or nowhere ("never"); <s> before every text."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    learner.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=240, show_progress=False))
    learnt = json.loads(learner.to_str())["model"]
    words = [
        "<unk>",
        "<s>",
        "</s>",
        *[f"<0x{b:02X}>" for b in range(256)],
        *sorted(learnt["vocab"], key=learnt["vocab"].get),
    ]
    bpe = Tokenizer(
        models.BPE(
            vocab={word: i for i, word in enumerate(words)},
            merges=[tuple(m) for m in learnt["merges"]],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    if scheme == "legacy":
        bpe.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        bpe.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
    else:
        bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        bpe.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
            + [decoders.Strip(" ", 1, 0)] * (scheme == "first")
        )
    bpe.add_special_tokens(
        [AddedToken(word, normalized=False, special=True) for word in ("<unk>", "<s>", "</s>")]
    )
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return finish(bpe, folder, chat, bos_token="<s>", eos_token="</s>", add_bos_token=True)


def finish(bpe, folder, chat, **names):
    os.makedirs(folder, exist_ok=True)
    bpe.save(os.path.join(folder, "tokenizer.json"))
    with open(os.path.join(folder, "tokenizer_config.json"), "w", encoding="utf-8") as f:
        json.dump(
            names
            | {"tokenizer_class": "PreTrainedTokenizerFast"}
            | ({"chat_template": chat} if chat else {}),
            f,
        )
    return str(folder)

"""Rows and token streams -> batches. Every batch is a pure function of (data, seed, step).

A data folder holds
    {train,val}.bin      a token stream: uint16, or uint32 above 65,535 tokens; documents end in end-of-text
    {train,val}.jsonl    ranked rows: {"prompt": str, "responses": [best, ..., worst], "group": str?, "scores": [float]?,
                         "history": [[prompt, response], ...]?}, the earlier turns of a conversation, which are not asked for;
                         or whole texts: {"text": str, "group": str?}, a response without a prompt or template
    meta.json            written last: tokenizer, vocabulary, dtype, sizes, source, sha256 of each file
"""

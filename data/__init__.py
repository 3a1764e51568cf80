"""Data folders, and the way from their rows and token streams to batches.

A data folder holds some of

    train.bin, val.bin        token streams, uint16, or uint32 for a vocabulary above 65,536 ids;
                              every document ends in the end-of-text token, and begins with what
                              the tokenizer puts before a text (such as <s>), if anything
    train.jsonl, val.jsonl    ranked rows, one JSON object a line, see below
    *.tiktoken, tokenizer.*   the tokenizer, if it is not "gpt2" or "bytes"
    meta.json                 written last: tokenizer and its checksum, vocabulary size, dtype,
                              source, sizes, and the bytes and sha256 of every file

A ranked row is {"prompt": str, "responses": [best, ..., worst]}. A response may be null (absent).
Optional fields:

    "group"      rows of one group are never on both sides of the train/val split
    "scores"     a number for each response, highest first; equal scores are ties
    "ranks"      in the files of a round: an integer for each response, 0 for the best; equal ones
                 are ties, and count whatever the scores are
    "system"     the system message before the conversation; the template must have {system}
    "history"    [[prompt, response], ...], the earlier turns of a conversation; they have no loss
    "ids"        token ids of sampled responses, used as they are; "tokenizer" is the checksum of
                 the tokenizer that made them, and what its template writes beside a response. With
                 another tokenizer, or a template that writes something else, the text is encoded
    "players"    in the files of a round: who gave each response
    "ended"      false: the response was cut, and gets no end-of-text. A list for several responses
    "lengths"    in the files of a round, if a response was cut to the run's limits: the tokens left
    "same_as"    in the files of a round: which response an absent one is equal to, or null

A row {"text": str, "group": str?} is a whole text: one response without a prompt and without a
template.

    files.py        JSON and .npz files, checksums, text for a terminal
    tokenizer.py    tokenizers: "gpt2", "bytes", .tiktoken files, other models' tokenizer.json
    template.py     how a prompt becomes token ids
    chat_template.py  other models' chat templates, from and to Jinja
    progress.py     progress bars, which are lines in a log file
    rows.py         read, check, write and encode ranked rows
    folder.py       read and write data folders and token streams
    batch.py        encoded rows and token streams -> batches
    generated.py    folders of data.addition and data.countdown
    formats.py      rows of other projects -> ranked rows
    hub/            data sets of the Hugging Face hub -> data folders, resumable
    NAME/prepare.py makes data/NAME: python -m data.NAME.prepare
    NAME/scorer.py  scores its responses: a function f(row, text) -> float
"""

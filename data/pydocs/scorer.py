"""A known reward for summaries of documentation: how concrete the text is. Deterministic.

    concrete = min(h, 6 - h) / 3 - share of repeated words,    from -1 to 1

where h is the number of different words of KINDS in the text, a plural counted as its singular.

"Return an index into the list, as bytes." names three kinds of things and scores 1. Naming more
than three lowers the score: such a sentence is a list. A policy can therefore over-optimise a
reward model that has seen few lists.
"""

import re

KINDS = frozenset(
    """
    array attribute axis bool boolean buffer byte bytes callable character class code column command
    context cursor data dataset date datetime decimal device dict dictionary dimension directory
    element entry error event exception file filename float folder frame function generator graph
    group header host index input instance int integer item iterable iterator key keyword layer line
    list map mapping mask matrix message method mode module name node number object option output
    package pair parameter path pattern pointer polynomial process queue range record request result
    row scalar sequence series server set shape signal size slice socket stack stream string table
    tensor text thread time token tree tuple type url user value variable vector version weight word
    """.split()
)


def words_of(text):
    return re.findall(r"[a-z]+", text.lower())


def singular(word):
    """The word, or its singular if it is not itself in KINDS."""
    return word if word in KINDS else word.removesuffix("s")


def kinds(text):
    """The number of different words of KINDS in a text."""
    return len(KINDS & {singular(word) for word in words_of(text)})


def concrete(row, text):
    """The score of a response (text). The data row is not used."""
    words = words_of(text)
    h = kinds(text)
    repeated = (len(words) - len(set(words))) / max(1, len(words))
    return max(-1.0, min(h, 6 - h) / 3 - repeated)

"""A reward that is known: how concrete a summary is. Deterministic, of the text alone.

A sentence of documentation that names the kinds of things it is about, "Return the index of a string in a list", says more than
one that names none; but three are enough, and a sentence that goes on naming them is a list. So a policy that is paid
by a judge that has seen few lists can be too greedy.

    concrete = min(h, 6 - h) / 3 - share of words said again,    from -1 to 1
    h        different words of KINDS in the text, plurals counted as singulars
"""

import re

KINDS = frozenset(
    """array attribute axis bool boolean buffer byte bytes callable character class code column command context cursor data dataset
date datetime decimal device dict dictionary dimension directory element entry error event exception file filename float folder
frame function generator graph group header host index input instance int integer item iterable iterator key keyword layer line
list map mapping mask matrix message method mode module name node number object option output package pair parameter path pattern
pointer polynomial process queue range record request result row scalar sequence series server set shape signal size slice socket
stack stream string table tensor text thread time token tree tuple type url user value variable vector version weight word""".split()
)


def words_of(text):
    return re.findall(r"[a-z]+", text.lower())


def kinds(text):
    """How many different words of KINDS a text has."""
    return len(KINDS & {w if w in KINDS or not w.endswith("s") else w[:-1] for w in words_of(text)})


def concrete(row, text):
    """The score of a response (text) to a data row, which is not looked at."""
    words, h = words_of(text), kinds(text)
    again = (len(words) - len(set(words))) / max(1, len(words))
    return max(-1.0, min(h, 6 - h) / 3 - again)

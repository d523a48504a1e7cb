"""The words of a caption, cut as the Penn Treebank tokenizer cuts them that COCO's evaluation runs in Java.

Lower case; `don't` is `do n't`, `dog's` is `dog 's`, `100%` is `100 %`; marks of punctuation stand alone and are then left out.
Brackets stay, as `-lrb-` and so on, since upstream's list of punctuation has them in capitals only. Held against Stanford's own
tokenizer on COCO captions; odd text (URLs, emoticons, fractions in one character) may be cut elsewhere.
"""

from __future__ import annotations

import re

_LEFT_OUT = frozenset({"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"})
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_QUOTES = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "--", "\u2014": "--"})
_ABBREVIATIONS = (
    r"mr|mrs|ms|dr|st|jr|sr|prof|gen|rep|sen|gov|lt|col|sgt|capt|rev|hon|mt|ft|inc|co|corp|ltd|etc|vs|no"
    r"|e\.g|i\.e|a\.m|p\.m"
)
_TOKEN = re.compile(
    rf"""
    n't\b | '(?:s|m|d|ll|re|ve)\b
    | (?:{_ABBREVIATIONS})\.(?=\s|$|[a-z,])        # an abbreviation keeps its full stop
    | (?:[a-z]\.){{2,}}                             # u.s.
    | \d+(?:[.,:]\d+)+                              # 3.5, 1,000, 10:30
    | '\d\d\b                                       # a year
    | [a-z]'[a-z]{{2,}}(?:[-&/]\w+)*               # o'clock, s'mores
    | \w+(?:[-&/]\w+)*                              # words, with hyphens inside
    | \.{{3}} | -{{2,}} | \S
    """,
    re.VERBOSE,
)
_SPLIT_WORDS = {
    "cannot": ("can", "not"), "gonna": ("gon", "na"), "gotta": ("got", "ta"), "wanna": ("wan", "na"),
    "gimme": ("gim", "me"), "lemme": ("lem", "me"),
}  # fmt: skip
_NOT = re.compile(r"(\w+?)(n't)\b")
_CLITIC = re.compile(r"(\w)('(?:s|m|d|ll|re|ve))\b")


def caption_words(text: str) -> list[str]:
    """Return the words of a caption, in lower case, without punctuation."""
    text = text.replace("\n", " ").translate(_QUOTES).lower()
    text = _CLITIC.sub(r"\1 \2", _NOT.sub(r"\1 \2", text))
    words: list[str] = []
    for token in _TOKEN.findall(text):
        words += _SPLIT_WORDS.get(token, (_BRACKETS.get(token, "``" if token == '"' else token),))
    return [word for word in words if word not in _LEFT_OUT]

"""VQA accuracy: how many of ten people gave the same answer, three or more counting as all of them.

The variants differ in what is made of a text before it is compared:

- `official`: the VQA repository's own code. The answer loses punctuation and articles, number words become digits, contractions
  get their apostrophe. The right answers lose punctuation only, and only if they are not all the same.
- `m4c`: the answer processor of TextVQA's evaluation, used by MMF, LLaVA and lmms-eval. Both sides, always; commas and question
  marks go first, and a final 's becomes a word.
- `vlmevalkit`: the official steps, on both sides, always.

Sources: https://github.com/GT-Vision-Lab/VQA, vqaEval.py; https://github.com/facebookresearch/mmf, m4c_evaluators.py;
https://github.com/open-compass/VLMEvalKit, vqa_eval.py.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

from vir_hf.errors import DataError, shown
from vir_hf.scores.judging import Item, Judge

NUM_REFERENCES = 10
_FEWEST_REFERENCES = 4
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# As written upstream: "(?!<=\d)" looks ahead for the characters "<=" and a digit, which a period never is.
_PERIOD = re.compile(r"\.(?!\d)")
_NUMBER_COMMA = re.compile(r"\d,\d")
_NUMBERS = {
    word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}
_ARTICLES = frozenset({"a", "an", "the"})
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd
    how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock oughtn't
    'ow's'at wasn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
    someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've
    they'll they're they've 'twas we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd
    who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've
    you'll you're you've
""".split()
# Upstream's table: each contraction, written with one of its apostrophes left out; one entry is the other way round.
CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word for word in _CONTRACTED for place, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}


@functools.lru_cache(maxsize=2**16)
def without_punctuation(text: str) -> str:
    """Return the text with each mark of punctuation left out, if it stands beside a space, or else replaced by one."""
    leaves_gaps = _NUMBER_COMMA.search(text) is None
    result = text
    for mark in _PUNCTUATION:
        is_beside_space = mark + " " in text or " " + mark in text
        result = result.replace(mark, " " if leaves_gaps and not is_beside_space else "")
    return _PERIOD.sub("", result, count=32)  # upstream gives re.UNICODE, which is 32, where the count stands


@functools.lru_cache(maxsize=2**16)
def plain_words(text: str) -> str:
    """Return the text in lower case, with digits for number words, without articles, contractions with their apostrophe."""
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _official_answer(text: str) -> str:
    return plain_words(without_punctuation(_one_line(text)))


def _m4c(text: str) -> str:
    words = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _official_answer(words)


def _official(answer: str, references: list[str]) -> tuple[str, list[str]]:
    if len(set(references)) > 1:
        references = [without_punctuation(reference) for reference in references]
    return _official_answer(answer), references


def _both_sides(process: Callable[[str], str]) -> Callable[[str, list[str]], tuple[str, list[str]]]:
    return lambda answer, references: (process(answer), [process(reference) for reference in references])


def _judge(prepare: Callable[[str, list[str]], tuple[str, list[str]]]) -> Judge:
    def judge(answer: str, item: Item) -> tuple[float, str]:
        if len(item.references) < _FEWEST_REFERENCES:
            raise DataError(
                f"question {shown(item.id)}: found {len(item.references)} right answers, expected {NUM_REFERENCES}: VQA accuracy "
                "asks how many people gave an answer, and below four none can score 1. Use --task exact."
            )
        given, right = prepare(answer, list(item.references))
        matches = right.count(given)
        # Each person's answer is left out in turn, and the answer is compared with those of the others.
        agreeing = [min(1.0, (matches - (reference == given)) / 3) for reference in right]
        return sum(agreeing) / len(agreeing), given

    return judge


official = _judge(_official)
m4c = _judge(_both_sides(_m4c))
vlmevalkit = _judge(_both_sides(_official_answer))

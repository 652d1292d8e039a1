"""Facts about things, and questions for them that name the thing or only describe it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from actors.tasks.paraphrases import CONCEPTS
from actors.tasks.recall import draw_codes, recall_query, recall_sentence
from actors.tasks.sample import Draws
from models.tokenizer import Tokenizer
from storage.corpus.wordnet import Entry

ATTRIBUTES = (
    "serial number",
    "phone number",
    "price",
    "weight",
    "access key",
    "address",
    "opening date",
    "room number",
    "size",
    "score",
    "capacity",
    "label",
    "version",
    "order number",
    "rating",
)
VAGUE_ATTRIBUTES = ("value", "figure", "detail", "entry", "number")

STATEMENTS = (
    "The {attribute} of the {word} is {value}.",
    "The {word}'s {attribute} is {value}.",
    "{value} is the {attribute} of the {word}.",
    "Note that the {word} has the {attribute} {value}.",
    "For the {word}, the {attribute} is {value}.",
    "{attribute}, {word}: {value}.",
)
LITERAL = (
    "Question: What is the {attribute} of the {word}?\nAnswer: The {attribute} of the {word} is",
    "What is the {word}'s {attribute}?",
    "Tell me the {attribute} for the {word}.\nThe {attribute} is",
    "Q: Which {attribute} does the {word} have?\nA:",
)
DESCRIBED = (
    "Question: What is the {attribute} of {description}?\nAnswer: The {attribute} is",
    "Which {vague} goes with {description}?",
    "Tell me about {description}.\nIts {vague} is",
    "Q: What {vague} is given for {description}?\nA: The {vague} of it is",
    "Question: Which {vague} belongs to {description}?\nAnswer:",
)

MAX_RARE_WORD_TOKENS = 2
"""Of a word nobody tagged in a text: what a tokenizer takes apart further is hardly known to its model."""

ARTICLES = ("a ", "an ", "the ", "any ", "some ", "one ", "either ", "someone ", "something ")


@dataclass(frozen=True)
class KeyFact:
    """One thing's fact."""

    word: str
    value: str
    """What is to be found of it."""
    statement: str
    """Holds word and value as they are."""
    literal: str
    """A question that names it."""
    described: str
    """A question that does not."""


def training_facts(entries: Sequence[Entry], tokenizer: Tokenizer, count: int, seed: int) -> list[KeyFact]:
    """Facts about as many different words, drawn by the seed, in varying sentences; fewer where there are fewer words
    that a language model is likely to know."""
    known = [
        entry
        for entry in entries
        if entry.num_tagged or len(tokenizer.encode(" " + entry.word)) <= MAX_RARE_WORD_TOKENS
    ]
    draws = Draws("key facts", seed)
    return [_fact(entry, draws) for entry in draws.sample(known, min(count, len(known)))]


def validation_facts(seed: int) -> list[KeyFact]:
    """Facts about the things that `evaluate tasks` asks for, in its words. Neither the things (`excluded_words`) nor
    these sentences are trained on: what is measured is what carries over."""
    draws = Draws("key validation", seed)
    return [
        KeyFact(
            word, code, recall_sentence(word, code), recall_query(word).strip(), recall_query(word, description).strip()
        )
        for (word, description), code in zip(CONCEPTS, draw_codes(draws, len(CONCEPTS)), strict=True)
    ]


def excluded_words() -> list[str]:
    """What keys are measured on, and must not be trained on."""
    return [word for word, _ in CONCEPTS]


def _fact(entry: Entry, draws: Draws) -> KeyFact:
    attribute = draws.pick(ATTRIBUTES)
    names = {"attribute": attribute, "word": entry.word, "vague": draws.pick(VAGUE_ATTRIBUTES)}
    names["description"] = entry.description if entry.description.startswith(ARTICLES) else f"the {entry.description}"
    value = str(10 + draws.below(99_990))
    statement = draws.pick(STATEMENTS).format(**names, value=value)
    return KeyFact(
        entry.word,
        value,
        statement[0].upper() + statement[1:],
        draws.pick(LITERAL).format(**names),
        draws.pick(DESCRIBED).format(**names),
    )

"""How turns of a conversation are written for a model: its chat template, taken apart into token ids.

What people and files say is encoded as ordinary text, so that nobody's words can end a turn or begin another's; only
the template's own markup becomes special tokens.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cluster.errors import ModelError
from models.tokenizer import Tokenizer

TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
CONFIG_FILES = ("generation_config.json", "config.json")

_SAID = ("\ue000one\ue000", "\ue000two\ue000", "\ue000three\ue000")
"""Private-use characters: no template holds them."""


@dataclass(frozen=True, eq=False)
class ChatFormat:
    """Token ids around what is said."""

    opening: np.ndarray
    """Before the first question: the system prompt or the template's own first words, and the question's markup."""
    before_answer: np.ndarray
    """Between a question and its answer."""
    between_turns: np.ndarray
    """Between an answer and the next question; begins with the end of turn that the model may have decoded itself."""
    end_ids: frozenset[int]
    """Tokens that end an answer."""
    stop_strings: tuple[str, ...] = ()
    """Text that ends an answer, where no token does."""

    @classmethod
    def of(cls, folder: Path, tokenizer: Tokenizer, system_prompt: str = "") -> ChatFormat:
        """The format of the model in `folder`: of its chat template; of plain `User:` and `Assistant:` without one.

        Raises:
            ModelError: a template that is broken, or changes what is said.
        """
        template = _template(folder)
        if template is None:
            start = f"{system_prompt}\n\n" if system_prompt else ""
            first, last, between = (tokenizer.encode(t) for t in (f"{start}User: ", "\nAssistant:", "\nUser: "))
            return cls(first, last, between, _end_ids(folder), ("\nUser:",))
        parts = _parts(template, system_prompt, folder)
        first, between, last = (tokenizer.encode_markup(text) for text in parts)
        return cls(first, last, between, _end_ids(folder))

    def next_turn(self, last_token: int | None) -> np.ndarray:
        """What comes before a question, given the last token of the session; None: it is the first."""
        if last_token is None:
            return self.opening
        ended = len(self.between_turns) > 0 and int(self.between_turns[0]) == last_token and last_token in self.end_ids
        return self.between_turns[1:] if ended else self.between_turns


def _template(folder: Path) -> str | None:
    file = folder / TEMPLATE_FILE
    if file.exists():
        return file.read_text("utf-8")
    config = folder / TOKENIZER_CONFIG_FILE
    found = json.loads(config.read_text("utf-8")).get("chat_template") if config.exists() else None
    return found if isinstance(found, str) else None


def _parts(template: str, system_prompt: str, folder: Path) -> tuple[str, str, str]:
    """The template's text before a first question, between an answer and the next question, and behind that one."""
    one, two, three = _SAID
    said = [("user", one), ("assistant", two), ("user", three)]
    if system_prompt:
        said.insert(0, ("system", system_prompt))
    messages = [{"role": role, "content": content} for role, content in said]

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    names = _special_names(folder)
    try:
        text = environment.from_string(template).render(messages=messages, add_generation_prompt=True, **names)
    except TemplateError as error:
        raise ModelError(f"the chat template of {folder} cannot be rendered: {error}") from error
    places = [text.find(word) for word in _SAID]
    if any(text.count(word) != 1 for word in _SAID) or places != sorted(places):
        raise ModelError(f"the chat template of {folder} changes, repeats or leaves out what is said")
    return text[: places[0]], text[places[1] + len(two) : places[2]], text[places[2] + len(three) :]


def _special_names(folder: Path) -> dict[str, Any]:
    """`bos_token`, `eos_token`, … as templates know them."""
    config = folder / TOKENIZER_CONFIG_FILE
    found = json.loads(config.read_text("utf-8")) if config.exists() else {}
    names = {}
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = found.get(key)
        names[key] = value.get("content", "") if isinstance(value, dict) else value or ""
    return names


def _end_ids(folder: Path) -> frozenset[int]:
    for name in CONFIG_FILES:
        file = folder / name
        found = json.loads(file.read_text("utf-8")).get("eos_token_id") if file.exists() else None
        if found is not None:
            return frozenset(found if isinstance(found, list) else [found])
    return frozenset()

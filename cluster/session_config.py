"""Configuration of sessions and of the jobs that hold one; same rules as `config`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from cluster.config import (
    TOKENS_PER_BLOCK,
    BaseLMConfig,
    GistNetConfig,
    RunConfig,
    StoreConfig,
    TrackingConfig,
    require,
)

Allocator = Literal["greedy", "optimal", "stochastic", "recency"]
SessionMode = Literal["overlay", "strict"]
SessionPositional = Literal["compact", "anchored", "global"]
SessionLayout = Literal["own_turn", "before_turn", "timeline"]

AUTO_LENSNET = "auto"
"""`session.lensnet` that takes the net that comes along."""


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is drawn; names and meanings are those of Hugging Face's `generate`."""

    max_new_tokens: int = 256
    """Longest answer, in tokens."""

    do_sample: bool = True
    """Draw from the distribution; off takes the likeliest token."""

    temperature: float = 0.2
    """Logits are divided by it before a draw."""

    top_k: int = 0
    """Draw from so many of the likeliest tokens; 0: from all."""

    top_p: float = 0.9
    """Draw from the likeliest tokens that together have this probability; 1: from all."""

    min_p: float = 0.0
    """Leave out tokens less likely than this share of the likeliest one's probability; 0: none."""

    typical_p: float = 1.0
    """Draw from the most typical tokens that together have this probability; 1: from all."""

    repetition_penalty: float = 1.0
    """Above 1, tokens of this answer are less likely to come again."""

    no_repeat_ngram_size: int = 0
    """Runs of so many tokens come once in an answer; 0: as often as they like."""

    stop_strings: list[str] = field(default_factory=list)
    """An answer ends where one of these appears in it, besides at the model's own end of turn."""

    ignore_eos: bool = False
    """Decode `max_new_tokens` whatever the model says; for measurements."""

    seed: int = 0
    """Seed of the draws. With the same session behind it an answer is the same."""

    def validate(self) -> None:
        require(self.max_new_tokens >= 1, f"sampling.max_new_tokens={self.max_new_tokens} must be at least 1")
        require(
            self.temperature > 0,
            f"sampling.temperature={self.temperature} must be above 0; for the likeliest token set "
            "sampling.do_sample=false",
        )
        require(self.top_k >= 0, "sampling.top_k must be 0 (all) or more")
        for name in ("top_p", "typical_p"):
            require(0 < getattr(self, name) <= 1, f"sampling.{name} must be above 0 and at most 1")
        require(0 <= self.min_p <= 1, "sampling.min_p must be from 0 to 1")
        require(self.repetition_penalty > 0, "sampling.repetition_penalty must be above 0")
        require(self.no_repeat_ngram_size >= 0, "sampling.no_repeat_ngram_size must be 0 (off) or more")
        require(all(self.stop_strings), "sampling.stop_strings must not hold an empty string")


@dataclass(frozen=True)
class SessionConfig:
    """The Working Context of a session, and when and how it is changed."""

    budget: int = 512
    """W_max: rows the model reads at most, in tokens and gists together. What is decoded until the next refocus counts:
    room for it is kept."""

    mode: SessionMode = "overlay"
    """`overlay`: gists stand for all there is and blocks are shown beside them. `strict`: a tiling."""

    positional: SessionPositional = "compact"
    """Where rows stand: `compact` one after the other, `anchored` compressed far from the end, `global` at their true
    places, which only holds as far as the model was trained."""

    layout: SessionLayout = "own_turn"
    """Where found blocks stand, the best last. `own_turn`: right before the question at hand, as if somebody had said
    them in a turn just before; `before_turn`: before the question's turn, without markup of their own. What is read
    again when they change is them and the question. `timeline`: in their place (docs/sessions.md)."""

    allocator: Allocator = "greedy"
    """Who chooses the blocks that are shown. `greedy`: by score. `optimal`: the exact optimum of scores for each cut.
    `stochastic`: by scores with noise, to explore. `recency`: none, all that is over goes to the newest tokens."""

    lensnet: str = AUTO_LENSNET
    """Folder of a LensNet of `train lensnet` that scores what words and keys found, and the newest blocks. `auto`: the
    one that comes along, where it was trained with the context's models. Empty, and where there is none: ranks are the
    scores."""

    lens_unit: float = 0.05
    """Nats a token that LensNet must expect of a block for a score of 1, the unit of bonus and price."""

    refocus_tokens: int = 32
    """Tokens decoded between two refocuses; there is one on every new prompt besides."""

    compact_tokens: int = 128
    """Full blocks wait for gists until there are so many tokens of them: the model's lower layers read chunks of 256
    tokens, whatever is new in them. Until then they stay raw. Less spends more time, more takes from the budget."""

    tail_tokens: int = 128
    """Newest tokens that are raw whatever else is."""

    max_blocks: int = 6
    """Found blocks that are shown beside the raw tail, at most."""

    age_tokens: int = 96
    """When the tail no longer fits, so many of its oldest tokens give way at a time: every time, all behind them is
    read again."""

    keep_bonus: float = 0.15
    """Hysteresis: what a block that is shown already has over others, in units of score (a block that every search
    finds first has 1)."""

    cooldown: int = 2
    """Refocuses before a block that was given up may come back by itself."""

    row_price: float = 0.001
    """What reading one row again costs, in units of score: edits are made when they gain more. 0: always."""

    exploration: float = 0.1
    """`stochastic`: scale of the Gumbel noise on scores."""

    query_tokens: int = 64
    """Newest tokens of the question, or of what was decoded, that are searched for."""

    candidates: int = 32
    """Blocks that each search brings, of each context."""

    lead_share: float = 0.8
    """What the block before a found one is worth, of its score, at least: a passage that a border cuts begins there. 0:
    what searches make of it alone."""

    system_prompt: str = ""
    """First words of a new session, always shown. Empty: the chat template's own."""

    record_events: bool = True
    """Keep what was shown, scored and edited, and what it was worth, in the context's folder (Parquet)."""

    seed: int = 0
    """Seed of `stochastic`."""

    def validate(self) -> None:
        block = TOKENS_PER_BLOCK
        require(
            self.layout == "timeline" or self.positional == "compact",
            f"session.layout={self.layout} gives rows an order of their own and needs session.positional=compact, not "
            f"{self.positional}; or set session.layout=timeline",
        )
        require(self.refocus_tokens >= 1, "session.refocus_tokens must be at least 1")
        require(
            block <= self.compact_tokens <= 1024 and self.compact_tokens % block == 0,
            f"session.compact_tokens={self.compact_tokens} must be a multiple of {block} up to 1024",
        )
        require(self.tail_tokens >= 0, "session.tail_tokens must be 0 or more")
        require(self.max_blocks >= 0, "session.max_blocks must be 0 or more")
        require(self.age_tokens >= block, f"session.age_tokens={self.age_tokens} must be at least {block}")
        need = self.compact_tokens + self.tail_tokens + self.refocus_tokens + block
        require(
            self.budget >= need,
            f"session.budget={self.budget} must be at least {need}: compact_tokens + tail_tokens + refocus_tokens + "
            f"{block}",
        )
        require(self.lens_unit > 0, f"session.lens_unit={self.lens_unit} must be more than 0 nats")
        require(self.cooldown >= 0, "session.cooldown must be 0 or more")
        require(min(self.keep_bonus, self.row_price, self.exploration) >= 0, "session's scores must not be negative")
        require(1 <= self.query_tokens <= 512, "session.query_tokens must be from 1 to 512")
        require(self.candidates >= 1, "session.candidates must be at least 1")
        require(0 <= self.lead_share <= 1, f"session.lead_share={self.lead_share} must be from 0 to 1")


@dataclass(frozen=True)
class ChatJob:
    """Talk with a model that remembers a context: type, or pipe lines in. Starts no cluster."""

    context: str = "chat"
    """Context of the session: what is said is appended to it. Made where there is none; another run goes on in it."""

    reads: list[str] = field(default_factory=list)
    """Other contexts of the store that the session sees and never writes."""

    prompt: str = ""
    """Ask this, print the answer and end. Empty: a conversation."""

    files: list[str] = field(default_factory=list)
    """Files, folders or globs to read into the context before the conversation, as `corpus.paths` of `compact`."""

    json: bool = False
    """Print one JSON object a turn instead of text."""

    run: RunConfig = field(default_factory=RunConfig)
    """Where the session's report and strip chart go; its name by default `chat-<context>`."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow."""
    base_lm: BaseLMConfig = field(default_factory=BaseLMConfig)
    """Who answers."""
    gistnet: GistNetConfig = field(default_factory=GistNetConfig)
    """Who compresses; the contexts must be its own."""
    store: StoreConfig = field(default_factory=StoreConfig)
    """The store; its `context` is the field above."""
    session: SessionConfig = field(default_factory=SessionConfig)
    """The Working Context."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How answers are drawn."""

    def validate(self) -> None:
        names = [self.context, *self.reads]
        for name in names:
            StoreConfig(context=name).validate()
        require(len(set(names)) == len(names), f"context and reads name a context twice: {', '.join(names)}")

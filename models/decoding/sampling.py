"""Drawing the next token, with the processors of Hugging Face's `generate`, in its order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from cluster.session_config import SamplingConfig


class Sampler:
    """Draws one answer's tokens."""

    def __init__(self, config: SamplingConfig, device: torch.device) -> None:
        self._config = config
        self._generator = torch.Generator(device=device).manual_seed(config.seed)
        self._processors = _processors(config)

    def draw(self, answer: Sequence[int], logits: Float[Tensor, " V"]) -> int:
        """The next token.

        Args:
            answer: tokens drawn so far, which penalties look at.
            logits: of the next one.
        """
        ids = torch.tensor([list(answer)], dtype=torch.int64, device=logits.device)
        scores = self._processors(ids, logits.float()[None])  # type: ignore[arg-type]  # it asks for legacy tensor types
        if not self._config.do_sample:
            return int(scores.argmax(dim=-1))
        return int(torch.multinomial(scores.softmax(dim=-1), 1, generator=self._generator))


def _processors(config: SamplingConfig) -> LogitsProcessorList:
    chosen = LogitsProcessorList()
    if config.repetition_penalty != 1.0:
        chosen.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    if config.no_repeat_ngram_size:
        chosen.append(NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))
    if not config.do_sample:
        return chosen
    if config.temperature != 1.0:
        chosen.append(TemperatureLogitsWarper(config.temperature))
    if config.top_k:
        chosen.append(TopKLogitsWarper(config.top_k))
    if config.top_p < 1.0:
        chosen.append(TopPLogitsWarper(config.top_p))
    if config.min_p:
        chosen.append(MinPLogitsWarper(config.min_p))
    if config.typical_p < 1.0:
        chosen.append(TypicalLogitsWarper(config.typical_p))
    return chosen

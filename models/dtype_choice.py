"""Whether a model should compute in float32 or bfloat16 here, measured."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from models.base_lm import BaseLM

MIN_SPEEDUP = 1.3
"""Below this bfloat16 is not worth its rounding. Far from both 1 and the 2-9 that fast hardware gives, so
that the noise of a short measurement does not flip the choice."""

MAX_KL_NATS = 0.01
"""KL(float32 ‖ bfloat16) of next-token predictions; a 135M model shows 0.002, the effect of a gist is 0.1."""

MAX_RELATIVE_ERROR = 0.05
"""‖h_bf16 - h_fp32‖ / ‖h_fp32‖ where only lower layers are loaded; 8 bits of mantissa give about 0.01."""

TIMED_TOKENS = 256
TIMED_LAYERS = 4
TIMED_REPEATS = 3
PROBE_TOKENS = 64

PROBE_TEXT = (
    "The library keeps every book it was ever given. Most of them stand in the cellar, and on the shelves upstairs "
    "there are short notes that say what each one holds. def find(shelf, title): return next(book for book in shelf "
    "if book.title == title). Whoever asks for a book by name gets it within the hour; in 1987 this took three days."
)


@dataclass(frozen=True)
class DtypeChoice:
    """What was chosen and why. Decided once, `dtype` goes to every worker, so that their results are equal."""

    dtype: Literal["float32", "bfloat16"]

    speedup: float
    """Time in float32 / time in bfloat16, over the lowest layers."""

    kl_nats: float | None
    """Mean KL(float32 ‖ bfloat16) a token over a probe text; None for a model loaded without its head."""

    relative_error: float
    """Of the hidden states after the timed layers."""

    def __str__(self) -> str:
        closeness = (
            f"KL {self.kl_nats:.4f} nats a token"
            if self.kl_nats is not None
            else f"hidden states off by {self.relative_error:.2%}"
        )
        return f"{self.dtype}: bfloat16 is {self.speedup:.2f}x as fast as float32 here, {closeness}"


def measure_dtypes(lm: BaseLM, probe_ids: Tensor) -> DtypeChoice:
    """Time and compare both dtypes on a model loaded in float32. Leaves `lm` in bfloat16, whatever is chosen.

    One copy of the weights exists at a time, so that a model that just fits in float32 can be measured.

    Args:
        probe_ids: (1, T) int64 ids of a natural text.
    """
    num_layers = min(TIMED_LAYERS, lm.num_layers)
    timed_ids = probe_ids.repeat(1, -(-TIMED_TOKENS // probe_ids.shape[1]))[:, :TIMED_TOKENS]
    with torch.inference_mode(), _one_thread(lm.device):
        exact_s, exact_hidden = _timed(lm, timed_ids, num_layers)
        exact = _log_probs(lm, probe_ids) if lm.has_head else None
        lm.cast_parameters(torch.bfloat16)
        fast_s, fast_hidden = _timed(lm, timed_ids, num_layers)
        fast = _log_probs(lm, probe_ids) if lm.has_head else None

    relative_error = float((fast_hidden - exact_hidden).norm() / exact_hidden.norm())
    kl_nats = None
    if exact is not None and fast is not None:
        kl_nats = float((exact.exp() * (exact - fast)).sum(-1).mean())
    speedup = exact_s / fast_s
    close = kl_nats <= MAX_KL_NATS if kl_nats is not None else relative_error <= MAX_RELATIVE_ERROR
    return DtypeChoice(
        dtype="bfloat16" if close and speedup >= MIN_SPEEDUP else "float32",
        speedup=speedup,
        kl_nats=kl_nats,
        relative_error=relative_error,
    )


def _timed(lm: BaseLM, ids: Tensor, num_layers: int) -> tuple[float, Tensor]:
    """Shortest time in seconds of the lowest layers, and their output in float32."""
    best_s, hidden = float("inf"), lm.embed(ids)
    for _ in range(1 + TIMED_REPEATS):  # the first run warms up; it is never the shortest
        start = _now_s(lm.device)
        hidden = lm.hidden_states(lm.embed(ids), [num_layers])[num_layers]
        best_s = min(best_s, _now_s(lm.device) - start)
    return best_s, hidden.float()


def _log_probs(lm: BaseLM, ids: Tensor) -> Tensor:
    return lm.logits(lm.embed(ids)).float().log_softmax(-1)


@contextlib.contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """On a CPU, compute in this thread alone: on a busy machine several wait for each other, and one dtype by chance
    for longer than the other. What one core gains is what all of them do."""
    num_threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _now_s(device: torch.device) -> float:
    """Seconds this thread has computed; where another device computes, of the clock, once it is done."""
    if device.type == "cpu":
        return time.thread_time()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

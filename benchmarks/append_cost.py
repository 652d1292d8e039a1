"""What appending a super-block costs in a large context against a small one."""

from __future__ import annotations

from contextlib import ExitStack

from benchmarks.harness import Result, Setting, median_ratio, percentiles, say, time_in_turns
from benchmarks.synthetic import build_context, encoding
from cluster.config import SLOTS_PER_SUPER_BLOCK


def append_cost(setting: Setting) -> Result:
    """One commit of one super-block (1,024 tokens, 32 gists and keys) at a time, in turns into all the contexts."""
    sizes = setting.size((10_000, 100_000, 1_000_000, 10_000_000), (10_000, 40_000))
    rounds = setting.size(400, 10)
    level = encoding(keys=True)
    with setting.scratch() as root, ExitStack() as stack:
        calls = {}
        for size in sizes:
            num_super_blocks = -(-size // SLOTS_PER_SUPER_BLOCK)
            writer, stream = build_context(root, f"tokens-{size}", level, num_super_blocks)
            stack.callback(writer.close)
            calls[str(size)] = lambda _, writer=writer, stream=stream: writer.append([next(stream)])
            say(f"  built a context of {writer.version().num_tokens:,} tokens")
        seconds = time_in_turns(calls, rounds, warm_up=setting.size(40, 2))
    detail = {f"append_at_{size}": percentiles(taken, 1e3, "ms") for size, taken in seconds.items()}
    return median_ratio(seconds[str(sizes[-1])], seconds[str(sizes[0])], "commits a context, in turns", detail)

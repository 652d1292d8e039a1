"""A durable commit of a super-block against the least that is durable: a checksummed append to a log, and fdatasync."""

from __future__ import annotations

import os
import struct
from contextlib import ExitStack
from pathlib import Path

import google_crc32c

from benchmarks.harness import Result, Setting, median_ratio, percentiles, time_in_turns
from benchmarks.synthetic import SuperBlocks, build_context, encoding


class RawLog:
    """Records of length, crc32c and payload. Durable when `append` returns."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def append(self, payload: bytes) -> None:
        """Write a record and wait for the disk."""
        record = struct.pack("<QI", len(payload), google_crc32c.value(payload)) + payload
        if os.write(self._descriptor, record) != len(record):
            raise OSError("the log took a part of a record; is the disk full?")
        os.fdatasync(self._descriptor)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


def durable_commit(setting: Setting) -> Result:
    """Tokens and gists (42 KB), and with keys (78 KB) beside it; log and context in turns, on one disk."""
    rounds = setting.size(1000, 10)
    calls, num_bytes = {}, {}
    with setting.scratch() as root, ExitStack() as stack:
        for name, keys in (("gists", False), ("gists_and_keys", True)):
            level = encoding(keys=keys)
            writer, stream = build_context(root, name, level, num_super_blocks=1)
            stack.callback(writer.close)
            log = RawLog(root / f"{name}.log")
            stack.callback(log.close)
            payloads = SuperBlocks(level, seed=1)
            calls[f"{name}_commit"] = lambda _, writer=writer, stream=stream: writer.append([next(stream)])
            calls[f"{name}_log"] = lambda _, log=log, payloads=payloads: log.append(_payload(payloads))
            num_bytes[name] = len(_payload(payloads))
        seconds = time_in_turns(calls, rounds, warm_up=setting.size(50, 2))
    with_keys = median_ratio(seconds["gists_and_keys_commit"], seconds["gists_and_keys_log"], "commits", {})
    detail = {
        "payload_bytes": num_bytes["gists"],
        "commit": percentiles(seconds["gists_commit"], 1e3, "ms"),
        "raw_log": percentiles(seconds["gists_log"], 1e3, "ms"),
        "with_keys": {
            "payload_bytes": num_bytes["gists_and_keys"],
            "ratio": round(with_keys.value, 3),
            "commit": percentiles(seconds["gists_and_keys_commit"], 1e3, "ms"),
            "raw_log": percentiles(seconds["gists_and_keys_log"], 1e3, "ms"),
        },
    }
    return median_ratio(seconds["gists_commit"], seconds["gists_log"], "commits, in turns", detail)


def _payload(stream: SuperBlocks) -> bytes:
    """The bytes of a super-block: tokens, counts and arrays."""
    span = next(stream)
    return b"".join(bytes(values.data) for values in (span.tokens, span.num_tokens, *span.arrays.values()))

"""Making gists of a window against what a model without memory does with it: one prefill."""

from __future__ import annotations

import dataclasses
from itertools import islice

import numpy as np
import torch

from actors.packing import Packer, Window
from benchmarks.corpus import corpus_files, open_files
from benchmarks.harness import Result, Setting, median_ratio, percentiles, time_in_turns
from cluster.config import SLOTS_PER_SUPER_BLOCK as WINDOW_TOKENS
from cluster.config import GistNetConfig
from models.base_lm import BaseLM, choose_dtype
from models.gistnet import build_gistnet
from models.tokenizer import Tokenizer
from models.window_encoder import WindowEncoder
from storage.corpus import read_corpus


def gistnet_vs_prefill(setting: Setting) -> Result:
    """The untrained `windowed` net and its LM, window by window in turns, in the dtype and threads of both."""
    config = setting.base_lm
    net_config = GistNetConfig(kind="windowed", lm_layers=setting.size(8, 2))
    if config.dtype == "auto":
        config = dataclasses.replace(config, dtype=choose_dtype(config, num_layers=net_config.lm_layers).dtype)
    base_lm = BaseLM.load(config)
    encoder = WindowEncoder(base_lm, build_gistnet(net_config, base_lm))
    warm_up, rounds = setting.size((3, 24), (1, 2))
    windows = corpus_windows(setting, warm_up + rounds, Tokenizer.load(config))

    def prefill(number: int) -> None:
        ids = torch.from_numpy(windows[number].astype(np.int64))[None]
        with torch.inference_mode():
            base_lm.logits(base_lm.embed(ids), last_only=True)

    calls = {"gistnet": lambda number: encoder.encode_windows([windows[number]]), "prefill": prefill}
    seconds = time_in_turns(calls, rounds, warm_up)
    detail = {
        "base_lm": base_lm.model_id,
        "dtype": str(base_lm.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "lm_layers": f"{net_config.lm_layers} of {base_lm.num_layers}",
        "gistnet": percentiles(seconds["gistnet"], 1e6 / WINDOW_TOKENS, "us_per_token"),
        "prefill": percentiles(seconds["prefill"], 1e6 / WINDOW_TOKENS, "us_per_token"),
    }
    return median_ratio(seconds["gistnet"], seconds["prefill"], "windows, in turns", detail)


def corpus_windows(setting: Setting, count: int, tokenizer: Tokenizer) -> list[np.ndarray]:
    """Full windows of the corpus, `(1024,)` uint32 each."""
    items = read_corpus(open_files(corpus_files(setting, 0, 2)))
    packed = Packer(tokenizer, lambda keys: {}).pack(items)
    full = (w.tokens for w in packed if isinstance(w, Window) and len(w.tokens) == WINDOW_TOKENS)
    return list(islice(full, count))

"""What storing real gists in fewer bits changes in them: bfloat16 and int8 against float16, all from float32."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from benchmarks.gistnet_prefill import corpus_windows
from benchmarks.harness import NUM_SPREAD_BLOCKS, Result, Setting
from cluster.config import GistDtype, GistNetConfig
from models.base_lm import BaseLM
from models.gistnet import build_gistnet, packaged_gistnet
from models.tokenizer import Tokenizer
from models.window_encoder import WindowEncoder
from storage.codec import decode_array, encode_arrays
from storage.schema import GISTS, ArraySpec

DTYPES: tuple[GistDtype, ...] = ("float16", "bfloat16", "int8")


def gist_error(setting: Setting) -> Result:
    """Relative L2 error of the worse of bfloat16 and int8 over that of float16, on gists of the corpus."""
    gists = _gists(setting)
    errors: dict[str, np.ndarray] = {}
    detail: dict[str, Any] = {"gists": len(gists), "dim": gists.shape[-1]}
    for dtype in DTYPES:
        spec = ArraySpec(GISTS, gists.shape[-1], dtype=dtype)
        stored = encode_arrays((spec,), {GISTS: gists}, len(gists))
        back = decode_array(spec, {name: np.array(values) for name, values in stored.items()}).float()
        errors[dtype] = ((back - gists).norm(dim=-1) / gists.norm(dim=-1)).numpy()
        # In float64: 1 - cos is smaller than float32 resolves.
        cosine = torch.nn.functional.cosine_similarity(back.double(), gists.double(), dim=-1)
        detail[dtype] = {
            "relative_l2_mean": float(f"{errors[dtype].mean():.3g}"),
            "relative_l2_max": float(f"{errors[dtype].max():.3g}"),
            "one_minus_cosine_mean": float(f"{float((1 - cosine).mean()):.3g}"),
            "one_minus_cosine_max": float(f"{float((1 - cosine).max()):.3g}"),
            "bytes_a_gist": sum(values.nbytes for values in stored.values()) // len(gists),
        }
    worse = max(DTYPES[1:], key=lambda dtype: errors[dtype].mean())
    parts = zip(*(np.array_split(errors[dtype], NUM_SPREAD_BLOCKS) for dtype in (worse, "float16")), strict=True)
    ratios = [float(mine.mean() / theirs.mean()) for mine, theirs in parts]
    return Result.of_repeats(ratios, f"{len(ratios)} parts of {len(gists)} gists", {"worse": worse, **detail})


def _gists(setting: Setting) -> torch.Tensor:
    """The packaged net's on SmolLM2, `(n, 576)` float32; with `--quick` of an untrained one on the tiny model."""
    config = replace(setting.base_lm, dtype="float32")
    base_lm = BaseLM.load(config)
    if setting.quick:
        net = build_gistnet(GistNetConfig(kind="windowed", lm_layers=2), base_lm)
    else:
        net = build_gistnet(GistNetConfig(path=str(packaged_gistnet(base_lm))), base_lm)
    encoder = WindowEncoder(base_lm, net)
    windows = corpus_windows(setting, setting.size(96, 3), Tokenizer.load(config))
    found = [torch.as_tensor(encoder.encode_windows([window])[0].gists) for window in windows]
    return torch.cat([gists.float().reshape(-1, gists.shape[-1]) for gists in found])

"""Several evaluations of gists against what compression should reach: kinds of text apart and together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from actors.evaluation.gist_evaluator import OWN, RECENCY, Condition, Measured
from actors.evaluation.gist_results import GistResults, Setting
from actors.evaluation.gist_sources import TREE
from actors.evaluation.places import Place
from actors.evaluation.samples import files_of_run, read_samples
from actors.evaluation.statistics import Estimate
from cluster.config_parser import parse_job
from cluster.errors import ConfigError
from cluster.gist_evaluation_config import EvaluateGistJob, GistEvaluationConfig

ALL_KINDS = "all"

CLAIM_PLACES = 400
"""Fewer are a look."""

CLAIM_ERRORS = 3.0
"""Standard errors from zero of what counts as more."""

Measure = Literal["content_nats", "over_recency", "recovered", "delta_nll"]
"""`content_nats`: see `GistResults`. `over_recency`: NLL behind as many recent raw tokens minus NLL behind the gists.
`recovered`: of what the full history is worth. `delta_nll`: NLL minus that behind the full history."""


@dataclass(frozen=True)
class Case:
    """What stands in for what: a way to use gists."""

    name: str
    """Also the folder of its runs."""
    shown: str
    history_tokens: int
    setting: Setting

    @property
    def evaluation(self) -> GistEvaluationConfig:
        """As `evaluate gist` measures it."""
        return GistEvaluationConfig(
            history_tokens=self.history_tokens,
            lods=[self.setting.lod],
            tail_tokens=[self.setting.tail_tokens],
            horizon_tokens=64,
        )


@dataclass(frozen=True)
class Bar:
    """What should be reached."""

    case: str
    measure: Measure
    bound: float
    """At least, but of `delta_nll` at most; 0: more than nothing by `CLAIM_ERRORS` standard errors."""

    def holds(self, estimate: Estimate) -> bool:
        """Whether it is reached."""
        if self.measure == "delta_nll":
            return estimate.mean <= self.bound
        if self.bound == 0:
            return estimate.mean > CLAIM_ERRORS * estimate.standard_error
        return estimate.mean >= self.bound

    @property
    def demanded(self) -> str:
        """As it stands in a table."""
        if self.measure == "delta_nll":
            return f"at most {self.bound:g}"
        return f"at least {self.bound:g}" if self.bound else f"over 0 by {CLAIM_ERRORS:g} errors"


CASES = (
    Case("practical", "14 gists and a raw tail of 64 for 512 tokens", 512, Setting(1, 64)),
    Case("gists-only", "8 gists for 256 tokens", 256, Setting(1, 0)),
    Case("lod2", "2 gists of LOD2 and a raw tail of 128 for 2,176 tokens", 2176, Setting(2, 128)),
    Case("quarter", "190 gists and a raw tail of 1,856 for 7,936 tokens", 7936, Setting(1, 1856)),
)
BARS = (
    Bar("practical", "content_nats", 0.03),
    Bar("practical", "over_recency", 0.0),
    Bar("gists-only", "content_nats", 0.25),
    Bar("gists-only", "over_recency", 0.0),
    Bar("lod2", "content_nats", 0.01),
    Bar("quarter", "delta_nll", 0.10),
)


@dataclass(frozen=True)
class FidelityRun:
    """What one run of `evaluate gist` measured of one kind of text."""

    kind: str
    results: GistResults

    @classmethod
    def read(cls, kind: str, folder: Path, case: Case) -> FidelityRun:
        """From the run's folder.

        Raises:
            ConfigError: there is no such run, not exactly one file of samples in it, or it measured another case.
        """
        recipe, file = files_of_run(folder, "evaluate gist")
        evaluation = parse_job(EvaluateGistJob, ["--config", str(recipe)]).evaluation
        wanted = case.evaluation
        for name in ("history_tokens", "lods", "tail_tokens", "horizon_tokens"):
            if getattr(evaluation, name) != getattr(wanted, name):
                raise ConfigError(
                    f"{recipe} has evaluation.{name}={getattr(evaluation, name)}; the case {case.name!r} is measured "
                    f"with {getattr(wanted, name)}"
                )
        # Documents of two corpora may have one name.
        samples = [(replace(p, uri=f"{kind}:{p.uri}"), m) for p, m in read_samples(file, Place, Measured)]
        return cls(kind, GistResults.of(samples))


def together(runs: Sequence[FidelityRun]) -> list[FidelityRun]:
    """The runs, and behind two or more of them what they say as one."""
    if len(runs) < 2:
        return list(runs)
    return [*runs, FidelityRun(ALL_KINDS, GistResults.of(sample for run in runs for sample in run.results.samples))]


def measured(results: GistResults, setting: Setting, measure: Measure) -> Estimate:
    """What a bar is compared with, of the tree's own gists."""
    own, recency = (Condition(name, setting.lod, setting.tail_tokens) for name in (f"{TREE}/{OWN}", RECENCY))
    if measure == "content_nats":
        return results.content_nats(TREE, setting)
    if measure == "over_recency":
        return results.difference(recency, own)
    return results.recovered_fraction(own) if measure == "recovered" else results.delta_nll(own)

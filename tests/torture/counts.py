"""What drills have done and found."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from tests.torture.oracle import Findings


@dataclass
class Counts:
    """Sums over drills."""

    kills: Counter[str] = field(default_factory=Counter)
    """By workload."""
    points: Counter[str] = field(default_factory=Counter)
    """Kills that hit a named write point, by its name."""
    cuts: Counter[str] = field(default_factory=Counter)
    """By workload."""
    cuts_in_recovery: int = 0
    """Of `cuts`, those before the first acknowledgement of a writer that had something to recover."""
    faults: Counter[str] = field(default_factory=Counter)
    """By errno, and once or for ever."""
    refused: Counter[str] = field(default_factory=Counter)
    """Of `faults`, those a caller saw, by the error's name; the others met work that is tried again."""
    acknowledged: int = 0
    lost: int = 0
    doubled: int = 0
    torn: int = 0
    failures: list[str] = field(default_factory=list)
    """A line for each inspection that found something, with what repeats it."""

    @property
    def ok(self) -> bool:
        """Nothing was lost, doubled or torn, and every refusal was one of ours."""
        return not self.failures

    def add(self, findings: Findings, where: str) -> None:
        """Count an inspection."""
        self.lost += len(findings.lost)
        self.doubled += len(findings.doubled)
        self.torn += len(findings.torn)
        if not findings.ok:
            self.failures.append(f"{where}: {findings}")

    def table(self) -> str:
        """One line a count."""

        def by_name(counter: Counter[str]) -> str:
            return ", ".join(f"{name} {count}" for name, count in sorted(counter.items()))

        rows = [
            ("kills", self.kills.total(), by_name(self.kills)),
            ("  at a named write point", self.points.total(), by_name(self.points)),
            ("power cuts", self.cuts.total(), by_name(self.cuts)),
            ("  in recovery", self.cuts_in_recovery, ""),
            ("faults injected", self.faults.total(), by_name(self.faults)),
            ("  seen by the caller", self.refused.total(), by_name(self.refused)),
            ("acknowledged commits", self.acknowledged, ""),
            ("lost", self.lost, ""),
            ("doubled", self.doubled, ""),
            ("torn", self.torn, ""),
        ]
        return "\n".join(f"{name:<26}{count:>9,}  {detail}".rstrip() for name, count, detail in rows)

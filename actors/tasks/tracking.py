"""Variable tracking after RULER (Hsieh et al. 2024): which names hold a value, through assignments of one to another.

Chains of assignments are cut into single statements, shuffled into one another and spread over the history. Only
one who sees all statements of a chain can name its variables; a chain's statements keep their order.
"""

from __future__ import annotations

from dataclasses import dataclass

from actors.tasks.sample import (
    NUM_CANDIDATES,
    Draws,
    Needle,
    NumberedTask,
    TaskSample,
    fit_places,
    near_misses,
    sample_id,
)
from actors.tasks.words import made_up_words
from cluster.errors import ConfigError


@dataclass(frozen=True)
class VariableTracking(NumberedTask):
    """Name the variables of one chain.

    Raises:
        ConfigError: fewer than one hop or chain.
    """

    name: str = "variable_tracking"
    num_hops: int = 2
    """Assignments from one variable to the next; a chain has one variable more."""
    num_chains: int = 3
    """The one that is asked for included."""

    def __post_init__(self) -> None:
        if self.num_hops < 1 or self.num_chains < 1:
            raise ConfigError(f"task {self.name}: num_hops and num_chains must be at least 1")

    def sample(self, seed: int, number: int, *, num_needle_places: int) -> TaskSample:
        """See `Task.samples`."""
        draws = Draws("tracking", self.name, seed, number)
        length = self.num_hops + 1
        names = [name.upper() for name in made_up_words(draws, self.num_chains * length + NUM_CANDIDATES)]
        chains = [names[chain * length : (chain + 1) * length] for chain in range(self.num_chains)]
        values = draws.numbers(self.num_chains, 10_000, 100_000)
        # A shuffle of chain numbers with repetitions: each chain's statements come in their order.
        turns = draws.shuffled([chain for chain in range(self.num_chains) for _ in range(length)])
        needles, done = [], [0] * self.num_chains
        for chain, depth in zip(turns, draws.depths(len(turns)), strict=True):
            step = done[chain]
            source = f"the value of {chains[chain][step - 1]}" if step else str(values[chain])
            needles.append(Needle(f"The variable {chains[chain][step]} is set to {source}.", depth, chain == 0))
            done[chain] += 1
        lures = [*(name for chain in chains[1:] for name in chain), *names[self.num_chains * length :]]
        candidates = draws.shuffled([chains[0], *near_misses(draws, chains[0], lures[: NUM_CANDIDATES - 1])])
        return TaskSample(
            self.name,
            sample_id(self.name, seed, number),
            fit_places(needles, num_needle_places),
            f"\n\nQuestion: Which variables have the value {values[0]}, in the order in which they were set?\n"
            "Answer: They are",
            ", ".join(chains[0]),
            tuple(", ".join(candidate) for candidate in candidates),
            {"seed": seed, "number": number, "num_hops": self.num_hops, "num_chains": self.num_chains},
        )

"""Configuration of the jobs that start, show and stop the service of a store; same rules as `config`."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.config import RayConfig, StoreConfig, require


@dataclass(frozen=True)
class StoreStartJob:
    """Start the service of a store: detached actors that write its contexts for all jobs of a cluster that lasts."""

    ray: RayConfig = field(default_factory=RayConfig)
    """The cluster; one that ends with the job is refused."""
    store: StoreConfig = field(default_factory=StoreConfig)
    """Which store (`store.root`); made when there is none."""
    actors: int = 2
    """Processes the contexts are spread over by name. Contexts of one process take turns."""
    json: bool = False
    """Print JSON instead of tables."""

    def validate(self) -> None:
        require(1 <= self.actors <= 64, f"actors={self.actors} must be from 1 to 64")


@dataclass(frozen=True)
class StoreStatusJob:
    """Show the service of a store: its actors, and the contexts they hold open for jobs."""

    ray: RayConfig = field(default_factory=RayConfig)
    """The cluster."""
    store: StoreConfig = field(default_factory=StoreConfig)
    """Which store (`store.root`)."""
    json: bool = False
    """Print JSON instead of tables."""


@dataclass(frozen=True)
class StoreStopJob:
    """Stop the service of a store: close its contexts and end its actors; jobs under way go on by themselves."""

    ray: RayConfig = field(default_factory=RayConfig)
    """The cluster."""
    store: StoreConfig = field(default_factory=StoreConfig)
    """Which store (`store.root`)."""
    timeout_s: float = 120.0
    """Longest wait for an actor to close its contexts, in seconds. One that does not is ended; what it acknowledged is
    safe."""
    json: bool = False
    """Print JSON instead of tables."""

    def validate(self) -> None:
        require(self.timeout_s > 0, "timeout_s must be positive")

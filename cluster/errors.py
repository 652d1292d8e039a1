"""Errors by cause. Each message says what was wrong, where, and what to do.

`is_recoverable` is the one place that tells a failure worth retrying (a process or node died) from
one that will come back (bad input, a full disk, another writer).
"""

from __future__ import annotations


class MegaContextError(Exception):
    """Base of every error this project raises on purpose; the command line prints it without a traceback."""

    exit_code = 1


class ConfigError(MegaContextError):
    """A configuration key or value that cannot work; raised before any resource is asked for."""

    exit_code = 2


class CorpusError(MegaContextError):
    """A corpus that cannot be read at all (a single bad document is quarantined instead)."""

    exit_code = 3


class ModelError(MegaContextError):
    """A model, tokenizer or GistNet that is missing, malformed or of the wrong kind."""

    exit_code = 4


class StorageError(MegaContextError):
    """Base of what the tree on disk can refuse."""

    exit_code = 5


class ContextNotFoundError(StorageError):
    """No context of that name in the store."""


class IncompatibleTreeError(StorageError):
    """The tree was made by another model, tokenizer, GistNet, dtype, dim or format than the one offered."""


class CorruptTreeError(StorageError):
    """A checksum, size or relation on disk is wrong; names the segment and node. Never served."""


class WriterConflictError(StorageError):
    """Another live process is the context's writer."""


class StaleWriterError(WriterConflictError):
    """This writer was fenced: a newer one has taken the context over."""


class InvalidWriteError(StorageError):
    """A write whose arrays have the wrong names, shapes, dtypes or values; nothing of it was stored."""


class OutOfOrderError(StorageError):
    """A write that would leave a gap in a document or a level, or contradict what is stored."""


class BranchConflictError(StorageError):
    """Two branches that cannot be joined as asked; nothing was changed."""


class BundleError(StorageError):
    """A file of `tree export` that cannot be written, is damaged or was forged, or does not fit the context it is to be
    brought into."""


class DiskFullError(StorageError):
    """The disk cannot hold the write, or an estimate says it will not. Nothing was lost."""


class NodeMissingError(StorageError):
    """A node outside the pinned version was asked for."""


class ResourceError(MegaContextError):
    """The cluster cannot be reached, refused us, or can never give what is asked for."""

    exit_code = 6


class ResourceTimeoutError(ResourceError):
    """Ray did not give what was asked for in time; says what was requested and what there was."""


class BusyError(ResourceError):
    """A service has as many requests as it may hold; the same one may be made again a little later."""


class ServiceMismatchError(ResourceError):
    """A running store service is not the one a job would write through: another store, code, format or disk."""


class TrackingError(MegaContextError):
    """MLflow could not be reached or refused the run."""

    exit_code = 7


class RunConflictError(MegaContextError):
    """Another live process is writing the run's folder."""

    exit_code = 8


class FocusError(MegaContextError):
    """A Working Context or an edit that would not be legal."""

    exit_code = 9


class BudgetError(FocusError):
    """A budget that cannot hold a legal Working Context; the message names the smallest that can."""


class StoreRestartedError(MegaContextError):
    """The tree store's process was lost and started anew: what it held and had not stored must come again."""

    exit_code = 5


FATAL = (ConfigError, CorpusError, ModelError, StorageError, FocusError)


LOST_PROCESS = frozenset(
    {
        "ActorDiedError",
        "ActorUnavailableError",
        "NodeDiedError",
        "ObjectLostError",
        "OutOfMemoryError",
        "OwnerDiedError",
        "StoreRestartedError",
        "WorkerCrashedError",
    }
)
"""Ray's exceptions for processes and nodes that are gone, and our own; by name, so that this module stays free of
Ray."""


def is_recoverable(error: BaseException) -> bool:
    """Whether running the same step again can help: true for lost processes, false for our own refusals.

    Ray, and Ray Data above it, wrap what a worker raised, several times over: the whole chain is looked at.
    """
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        cause = getattr(link, "cause", None)
        link = cause if isinstance(cause, BaseException) else link.__cause__
    if any(isinstance(link, FATAL) for link in chain):
        return False
    return any(kind.__name__ in LOST_PROCESS for link in chain for kind in type(link).__mro__)

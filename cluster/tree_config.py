"""Configuration of the jobs that show, move and carry away the versions of a context; same rules as `config`."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.config import BaseLMConfig, GistNetConfig, StoreConfig, require


@dataclass(frozen=True)
class TreeLogJob:
    """List the versions of a branch, newest first; with `audit` the changes that are more than an append."""

    store: StoreConfig = field(default_factory=StoreConfig)
    """Which store, context and branch (`store.version`)."""
    limit: int = 20
    """How many."""
    audit: bool = False
    """Show the audit log instead: forks, rollbacks, tags, collections, … with who did them."""
    json: bool = False
    """Print JSON instead of tables."""

    def validate(self) -> None:
        require(self.limit >= 1, f"limit={self.limit} must be at least 1")


@dataclass(frozen=True)
class TreeShowJob:
    """Show one version (`store.version`): what it holds, who made it, and its newest documents."""

    store: StoreConfig = field(default_factory=StoreConfig)
    """Which store, context and version."""
    documents: int = 10
    """How many documents to list."""
    json: bool = False
    """Print JSON instead of tables."""


@dataclass(frozen=True)
class TreeBranchJob:
    """List the branches; or `create`, `merge` or `discard` one. A branch shares what it was forked from: it costs
    nothing to make."""

    store: StoreConfig = field(default_factory=StoreConfig)
    """Which store and context. `store.version` is what `create` forks from, and the branch that `merge` adds to."""
    create: str = ""
    """Name of a new branch."""
    at_block: int = -1
    """With `create`: share only so many blocks (32 slots each); -1 shares all."""
    merge: str = ""
    """Bring what this branch has behind its fork to `store.version`: by fast-forward where that stood still,
    otherwise by appending whole documents."""
    discard: str = ""
    """Take this branch's name away; its versions stay until `tree gc` collects them."""
    message: str = ""
    """Kept with the new version."""
    retired: bool = False
    """List branches, too, that lost their name and are not collected yet."""
    json: bool = False
    """Print JSON instead of tables."""

    def validate(self) -> None:
        asked = [name for name in ("create", "merge", "discard") if getattr(self, name)]
        require(len(asked) <= 1, f"one of create, merge and discard at a time; got {' and '.join(asked)}")
        require(self.at_block >= -1, f"at_block={self.at_block} must be 0 or more, or -1 for all")


@dataclass(frozen=True)
class TreeTagJob:
    """List the tags; or `create` one for `store.version`, or `delete` one. A tagged version is never collected."""

    store: StoreConfig = field(default_factory=StoreConfig)
    """Which store, context and version."""
    create: str = ""
    """Name of a new tag."""
    delete: str = ""
    """Name of a tag to forget."""
    message: str = ""
    """Kept with the tag."""
    json: bool = False
    """Print JSON instead of tables."""

    def validate(self) -> None:
        require(not (self.create and self.delete), "one of create and delete at a time")


@dataclass(frozen=True)
class TreeDiffJob:
    """What two versions do not share: documents, blocks, tokens, bytes."""

    store: StoreConfig = field(default_factory=StoreConfig)
    """Which store and context; `store.version` is the one side."""
    other: str = "main"
    """The other side: a branch, a tag or a number."""
    documents: int = 20
    """How many documents of each side to list."""
    json: bool = False
    """Print JSON instead of tables."""


@dataclass(frozen=True)
class TreeRollbackJob:
    """Let a branch (`store.version`) stand at another version again. Nothing is lost: roll back to the version it
    stood at before."""

    store: StoreConfig = field(default_factory=StoreConfig)
    """Which store, context and branch."""
    to: str = ""
    """Where to: a tag, a branch or a number that `tree log` shows."""
    message: str = ""
    """Kept with the new version."""
    json: bool = False
    """Print JSON instead of tables."""

    def validate(self) -> None:
        require(bool(self.to), "to is empty; give a tag, a branch or a number that `tree log` shows")


@dataclass(frozen=True)
class TreeExportJob:
    """Write a version of a context, or a span of it, as one checksummed file for `tree import` on any machine."""

    store: StoreConfig = field(default_factory=StoreConfig)
    """Which store, context and version."""
    to: str = ""
    """The file to write. It appears when it is complete and on the disk."""
    first_block: int = 0
    """Where the span begins, in blocks (32 slots each). From 0 on, the levels above the blocks come along."""
    num_blocks: int = -1
    """Length of the span in blocks; -1 is up to the version's end."""
    overwrite: bool = False
    """Replace a file that is there."""
    json: bool = False
    """Print JSON instead of tables."""

    def validate(self) -> None:
        require(bool(self.to), "to is empty; give the file to write")
        require(self.first_block >= 0, f"first_block={self.first_block} must be 0 or more")
        require(self.num_blocks >= 1 or self.num_blocks == -1, f"num_blocks={self.num_blocks} must be 1 or more, or -1")


@dataclass(frozen=True)
class TreeImportJob:
    """Check a file of `tree export` and append what it holds to a context, which is made when it is not there."""

    store: StoreConfig = field(default_factory=StoreConfig)
    """Which store, context and branch (`store.version`). `gist_dtype` is the file's."""
    from_file: str = ""
    """The file to read."""
    json: bool = False
    """Print JSON instead of tables."""

    def validate(self) -> None:
        require(bool(self.from_file), "from_file is empty; give a file that `tree export` wrote")


@dataclass(frozen=True)
class TreeGcJob:
    """Remove what no branch, tag or reader needs and what is older than `keep_days`. Only looks unless `apply`."""

    store: StoreConfig = field(default_factory=StoreConfig)
    """Which store and context."""
    keep_days: float = 14.0
    """How long a version can be gone back to once its branch was retired or its gists were replaced, in days."""
    apply: bool = False
    """Remove it. Without, the job says what it would remove."""
    json: bool = False
    """Print JSON instead of tables."""

    def validate(self) -> None:
        require(self.keep_days >= 0, f"keep_days={self.keep_days} must be 0 or more")


@dataclass(frozen=True)
class TreeDeleteJob:
    """Take documents out of a branch (`store.version`), so that rolling back brings them back; or `erase` them, so that
    nothing does. Only looks unless `apply`."""

    store: StoreConfig = field(default_factory=StoreConfig)
    """Which store, context and branch."""
    documents: list[str] = field(default_factory=list)
    """Their URIs as `inspect` shows them, or shell patterns of those."""
    superseded: bool = False
    """Take out, of documents with the same URI, all but the newest: what an updated file left behind."""
    erase: bool = False
    """Remove tokens, gists, keys, words and rows from every version, and scrub the files. What lies outside the store
    (backups, exported bundles, reports of runs) is not touched."""
    keep_days: float = 14.0
    """With `erase`: how long other versions can be gone back to, as in `tree gc`."""
    message: str = ""
    """Kept with the new version."""
    apply: bool = False
    """Do it. Without, the job lists what it would take out, and who still shows it."""
    json: bool = False
    """Print JSON instead of tables."""

    def validate(self) -> None:
        require(bool(self.documents) or self.superseded, "documents is empty; give URIs or patterns, or superseded")
        require(self.keep_days >= 0, f"keep_days={self.keep_days} must be 0 or more")


@dataclass(frozen=True)
class TreeBackupJob:
    """Copy a context into another store while it is used; the next backup copies what is new."""

    store: StoreConfig = field(default_factory=StoreConfig)
    """Which store and context; every version of it is copied."""
    to: str = ""
    """Folder of the store that takes the copy, best on another disk; made when there is none."""
    json: bool = False
    """Print JSON instead of tables."""

    def validate(self) -> None:
        require(bool(self.to), "to is empty; give the folder that takes the backup")


@dataclass(frozen=True)
class TreeRepairJob:
    """Mend what `tree verify` finds damaged and can be had again: gists from tokens, the lexical index from the blocks,
    segments from a backup. Only looks unless `apply`."""

    store: StoreConfig = field(default_factory=StoreConfig)
    """Which store and context; every version of it is mended."""
    from_store: str = ""
    """Folder of a backup (a store that `tree backup` wrote), for what nothing else can bring back."""
    base_lm: BaseLMConfig = field(default_factory=BaseLMConfig)
    """The language model that the tree was made with; loaded only when gists or the index are made anew."""
    gistnet: GistNetConfig = field(default_factory=GistNetConfig)
    """The net that made the damaged gists; another one is refused."""
    threads: int = 1
    """CPU threads for making gists."""
    apply: bool = False
    """Do it. Without, the job says what it would do, and what is lost."""
    json: bool = False
    """Print JSON instead of tables."""

    def validate(self) -> None:
        require(self.threads >= 1, f"threads={self.threads} must be at least 1")

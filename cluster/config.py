"""The configuration tree: frozen dataclasses with a docstring under each field.

A recipe in `configs/` and `--section.key value` on the command line fill the same tree; `validate`
of each section refuses what cannot work before anything is started. Units stand in the names.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cluster.errors import ConfigError

TOKENS_PER_BLOCK = 32
"""K: tokens of a block and children of a node; the unit of alignment. A constant of the format."""

BLOCKS_PER_SUPER_BLOCK = 32
SLOTS_PER_SUPER_BLOCK = TOKENS_PER_BLOCK * BLOCKS_PER_SUPER_BLOCK

GistDtype = Literal["float16", "bfloat16", "float32", "int8"]
ComputeDtype = Literal["auto", "float32", "bfloat16"]
CorpusSplit = Literal["all", "train", "dev", "held_out"]
StoreServiceUse = Literal["auto", "require", "off"]
GistNetKind = Literal["windowed", "block", "constant", "last_token", "mean", "rescaled_mean"]


def require(condition: bool, message: str) -> None:
    """Refuse a value, inside a section's `validate`.

    Raises:
        ConfigError: with the message, unless the condition holds.
    """
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True)
class RunConfig:
    """Where a job leaves what it found out."""

    name: str = ""
    """Name of the run, and of its folder. Empty: the job's default name. The same name resumes."""

    dir: Path = Path("runs")
    """Folder of all runs; this one writes to `<dir>/<name>/`. A relative path starts at MEGACONTEXT_HOME when
    that is set, at `~/megacontext` in a submitted job (whose own folder is temporary), else where you are."""

    def validate(self) -> None:
        require(
            "/" not in self.name and self.name not in {".", ".."},
            f"run.name={self.name!r} must be a plain folder name; set run.dir to choose where runs are kept",
        )


@dataclass(frozen=True)
class RayConfig:
    """The cluster a job runs on."""

    address: str = "auto"
    """`auto`: the cluster of a submitted job or of RAY_ADDRESS, else an embedded one. `local`: always
    embedded. Otherwise the address of a running cluster this machine is a node of (`host:port`), or of its
    Ray Client server (`ray://host:port`)."""

    num_cpus: int = 0
    """CPUs of an embedded cluster; 0 takes all of the machine. Ignored on an existing cluster."""

    object_store_memory_mb: int = 256
    """Shared memory of an embedded cluster in MiB. Raise it for long windows or many workers."""

    start_timeout_s: float = 120.0
    """Longest wait for the cluster to start or answer, in seconds."""

    resource_timeout_s: float = 120.0
    """Longest wait for an actor to get the CPUs or GPUs it asked for, in seconds."""

    def validate(self) -> None:
        require(self.num_cpus >= 0, f"ray.num_cpus={self.num_cpus} must be 0 (all) or more")
        require(
            self.object_store_memory_mb >= 80,
            f"ray.object_store_memory_mb={self.object_store_memory_mb} must be at least 80, Ray's own minimum",
        )
        require(self.start_timeout_s > 0, "ray.start_timeout_s must be positive")
        require(self.resource_timeout_s > 0, "ray.resource_timeout_s must be positive")


@dataclass(frozen=True)
class TrackingConfig:
    """MLflow."""

    enabled: bool = True
    """Whether the run is tracked in MLflow."""

    uri: str = ""
    """Tracking URI. Empty: `sqlite:///<run.dir>/mlflow.db`, which needs no server."""

    experiment: str = "megacontext"
    """MLflow experiment the run is filed under."""

    def validate(self) -> None:
        require(bool(self.experiment), "tracking.experiment must not be empty")


@dataclass(frozen=True)
class CorpusConfig:
    """What to read."""

    paths: list[str] = field(default_factory=list)
    """Files, folders or globs (`~` and `**` work). Folders are walked in sorted order. `stdlib:` stands for the
    sources of the running Python's standard library, `package:<name>` for a corpus of `corpora_file`."""

    format: Literal["auto", "text", "jsonl", "parquet", "huggingface"] = "auto"
    """`auto` goes by file name: .jsonl/.ndjson, .parquet, anything else is text."""

    include: list[str] = field(default_factory=lambda: ["*"])
    """File-name globs a walked folder's files must match (any of them), for example `*.py`."""

    exclude: list[str] = field(default_factory=lambda: [".*", "__pycache__", "node_modules", "*.pyc", "*.so", "*.lock"])
    """Globs of file or folder names that are left out of a walk."""

    text_column: str = "text"
    """Column of a JSON Lines, Parquet or Hugging Face row that holds the text."""

    uri_column: str = ""
    """Column that names a row's document. Empty: `<file>#<byte offset>` (JSON Lines) or `<file>#<row>`."""

    max_document_bytes: int = 64 * 2**20
    """Larger documents go to quarantine. In bytes of the raw text (JSON Lines: of the whole line)."""

    dataset: str = ""
    """Hugging Face dataset as `id` or `id:configuration` (format `huggingface`; needs the `hub` extra and network)."""

    dataset_split: str = "train"
    """Split of the Hugging Face dataset."""

    corpora_file: str = ""
    """YAML file of named corpora, pinned packages, that `package:` paths look into. Empty: the project's own
    `configs/corpora.yaml`."""

    cache_dir: Path = Path("~/.cache/megacontext/corpora")
    """Where packages are fetched to, once. On a cluster of several machines a folder they all see. Safe to delete."""

    split: CorpusSplit = "all"
    """Part of the documents to read, 80, 10 and 10% of them, drawn by the hash of their bytes. `all`: no split."""

    tags: list[str] = field(default_factory=list)
    """Tags given to every document."""

    def validate(self) -> None:
        if self.format == "huggingface":
            require(bool(self.dataset), "corpus.format=huggingface needs corpus.dataset=<id>")
        require(self.max_document_bytes > 0, "corpus.max_document_bytes must be positive")
        require(bool(self.include), "corpus.include must hold at least one glob; '*' takes every file")

    @property
    def names_text(self) -> bool:
        """Whether it says what to read."""
        return bool(self.paths) or self.format == "huggingface"

    def require_text(self) -> None:
        """For jobs that cannot do without.

        Raises:
            ConfigError: no paths.
        """
        require(
            self.names_text,
            "corpus.paths is empty; give files, folders or globs, for example --corpus.paths '[docs]'",
        )


@dataclass(frozen=True)
class BaseLMConfig:
    """The language model whose memory this is. Frozen."""

    source: str = "smollm2-135m"
    """`smollm2-135m` (the packaged GGUF), `tiny` (a small random model for tests), a local folder or `.gguf` file, or
    a hub id such as `HuggingFaceTB/SmolLM2-360M`."""

    dtype: ComputeDtype = "auto"
    """Compute dtype. `auto` measures float32 against bfloat16 at start and takes what is faster and close."""

    device: str = "auto"
    """`auto`, `cpu` or `cuda[:n]`."""

    cache_dir: Path = Path("~/.cache/megacontext")
    """Where converted models are kept. Shared by all projects of this user; safe to delete."""

    adapter: str = ""
    """Folder of a LoRA adapter that `train gistnet` trained with a net (peft's format), for `evaluate gist` to read
    with; other jobs refuse it. On a cluster of several machines a folder they all see. Empty: none."""

    def validate(self) -> None:
        require(bool(self.source), "base_lm.source must not be empty")


AUTO_GISTNET = "auto"
"""`gistnet.path` that leaves the choice to the model and the context (`actors.plan.plan_models`)."""


@dataclass(frozen=True)
class GistNetConfig:
    """The net that compresses 32 children into a node's m vectors."""

    kind: GistNetKind = "windowed"
    """`windowed`: embeddings and lower-layer states of the LM over the last 1,024 tokens. `block`: a small
    transformer over 32 tokens alone. `constant`, `last_token`, `mean`, `rescaled_mean`: controls. Ignored when `path`
    is set."""

    path: str = AUTO_GISTNET
    """Folder of a saved GistNet (safetensors + config), or one of MLflow's registry: `models:/NAME/VERSION`,
    `models:/NAME/latest`, `models:/NAME@ALIAS`. Empty: an untrained one of `kind`. `auto`: the trained one that comes
    along with `base_lm.source`, where there is one, nothing else of this section is set, and the context was not begun
    with the untrained one; else untrained."""

    num_vectors: int = 1
    """m: vectors a node; 1, 2 or 4. A node's cost in a Working Context is m."""

    lm_layers: int = 8
    """Lower layers of the LM the `windowed` net reads. More see further and cost more."""

    key_layer: int = 4
    """The `windowed` net's routing keys are made of the LM's states after so many layers; of those after `lm_layers`
    where that is no more. Of planted facts layer 4 found 96%, layer 8 71% (four of 1,536 blocks, pooled, whitened)."""

    key_dim: int = 0
    """Width of routing keys, at most the LM's; 0: as wide as its states. A tree's keys take 2 bytes a dimension and
    block."""

    num_heads: int = 4
    """Pooling heads (`windowed`) or attention heads (`block`)."""

    num_keywords: int = 0
    """Words of its block, rare ones, that each vector of an untrained gist of `windowed` and `block` begins as, up to
    32; 0: as the last token. What is rare is measured when training begins; before that words count alike."""

    hidden_dim: int = 0
    """Width of the adapter. 0: twice the LM's width (`windowed`), the LM's width (`block`)."""

    seed: int = 0
    """Seed of an untrained net's weights."""

    def validate(self) -> None:
        require(self.num_vectors in {1, 2, 4}, f"gistnet.num_vectors={self.num_vectors} must be 1, 2 or 4")
        require(self.lm_layers >= 0, "gistnet.lm_layers must be 0 or more")
        require(self.key_layer >= 1, "gistnet.key_layer must be at least 1")
        require(self.key_dim >= 0, "gistnet.key_dim must be 0 or more")
        require(self.num_heads >= 1, "gistnet.num_heads must be at least 1")
        require(
            0 <= self.num_keywords <= TOKENS_PER_BLOCK,
            f"gistnet.num_keywords={self.num_keywords} must be from 0 to {TOKENS_PER_BLOCK}",
        )


@dataclass(frozen=True)
class StoreConfig:
    """The MegaContext Tree on disk."""

    root: Path = Path("data/store")
    """Folder of the store. One store holds many contexts. Relative paths: see run.dir."""

    context: str = "default"
    """Name of the context (one tree) in the store."""

    version: str = "main"
    """What is read: a branch, a tag, or the number of a version that `tree log` shows. What is written goes to a
    branch."""

    gist_dtype: GistDtype = "float16"
    """How gists and routing keys are stored. int8 has one scale per 64 dimensions: half of float16."""

    segment_super_blocks: int = 32
    """Super-blocks (1,024 slots each) of one sealed segment: 32 is 32,768 slots, about 2.5 MB at d = 576."""

    service: StoreServiceUse = "auto"
    """Whether `compact`, `curate` and `tree rebuild-gists` write through the service that `store start` started for it.
    `auto`: when one runs on the job's cluster; `require`: refused without one; `off`: the job opens the context
    itself."""

    def validate(self) -> None:
        require(
            bool(self.context) and all(c.isalnum() or c in "-_." for c in self.context) and self.context[0] not in ".-",
            f"store.context={self.context!r} may hold letters, digits, '-', '_' and '.', "
            "and starts with a letter, digit or '_'",
        )
        require(
            self.segment_super_blocks >= 1 and self.segment_super_blocks & (self.segment_super_blocks - 1) == 0,
            f"store.segment_super_blocks={self.segment_super_blocks} must be a power of two",
        )


@dataclass(frozen=True)
class CompactionConfig:
    """How documents become gists."""

    feed: Literal["auto", "actors", "ray_data"] = "auto"
    """`actors`: plain actors with a bounded window, quick to start, for small or live input. `ray_data`: for
    bulk corpora. `auto` picks by size and says so."""

    bulk_threshold_tokens: int = 3_000_000
    """With feed=auto, corpora estimated above this go through Ray Data (its start costs 15-30 s)."""

    num_compactors: int = 1
    """GistNet workers. On CPUs one worker with all threads is best; with GPUs take one a device."""

    threads_per_compactor: int = 0
    """torch threads of a worker; 0 shares the cluster's CPUs out evenly. Results are bit-identical only at
    equal thread counts."""

    gpus_per_compactor: float = 0.0
    """GPUs of a worker; 0 computes on the CPU."""

    num_packers: int = 0
    """Ray Data tasks that read and tokenise at the same time, half a CPU each; 0 lets Ray Data decide. The `actors`
    feed packs in the job's own process."""

    follower_threads: int = 1
    """torch threads of the worker that makes LOD2 and above: a 32nd of the compactors' work."""

    lexical: bool = True
    """Index the blocks' text behind the commits (`lexical.sqlite`: about 0.15 ms of one core and 150 bytes a block).
    Without, the first search or evaluation of the context does it."""

    max_in_flight: int = 4
    """Batches waiting at a worker. More hides latency, costs memory."""

    windows_per_batch: int = 8
    """Document windows (1,024 tokens each) of one call to a worker, and of one commit."""

    window_batch: int = 1
    """Windows of one forward pass, always padded to this number so that results are bit-identical. 1 is best
    on CPUs, 8-32 on GPUs."""

    def validate(self) -> None:
        require(self.num_compactors >= 1, "compaction.num_compactors must be at least 1")
        require(self.threads_per_compactor >= 0, "compaction.threads_per_compactor must be 0 (share) or more")
        require(self.gpus_per_compactor >= 0, "compaction.gpus_per_compactor must be 0 or more")
        require(self.num_packers >= 0, "compaction.num_packers must be 0 (Ray Data decides) or more")
        require(self.follower_threads >= 1, "compaction.follower_threads must be at least 1")
        require(self.max_in_flight >= 1, "compaction.max_in_flight must be at least 1")
        require(self.windows_per_batch >= 1, "compaction.windows_per_batch must be at least 1")
        require(self.window_batch >= 1, "compaction.window_batch must be at least 1")


@dataclass(frozen=True)
class ReadBackConfig:
    """The demo's last part: the real model reads a held part of the history back."""

    num_samples: int = 24
    """Places of the corpus that are read. More gives smaller error bars and takes longer."""

    history_tokens: int = 1024
    """Raw tokens before the horizon, in tokens; the gists stand in for these."""

    horizon_tokens: int = 64
    """H: tokens whose NLL is measured."""

    seed: int = 0
    """Seed of the choice of places."""

    def validate(self) -> None:
        require(self.num_samples >= 2, "read_back.num_samples must be at least 2 (for an error bar)")
        require(
            self.history_tokens >= TOKENS_PER_BLOCK and self.history_tokens % TOKENS_PER_BLOCK == 0,
            f"read_back.history_tokens={self.history_tokens} must be a multiple of {TOKENS_PER_BLOCK}, not 0",
        )
        require(self.horizon_tokens >= 1, "read_back.horizon_tokens must be at least 1")


@dataclass(frozen=True)
class CompactJob:
    """Read a corpus into a context: tokens and gists of every level, on disk."""

    run: RunConfig = field(default_factory=RunConfig)
    """Where the run's report goes."""
    ray: RayConfig = field(default_factory=RayConfig)
    """The cluster."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow."""
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    """What to read."""
    base_lm: BaseLMConfig = field(default_factory=BaseLMConfig)
    """The frozen language model."""
    gistnet: GistNetConfig = field(default_factory=GistNetConfig)
    """The compressor."""
    store: StoreConfig = field(default_factory=StoreConfig)
    """The tree on disk."""
    compaction: CompactionConfig = field(default_factory=CompactionConfig)
    """Feeds, workers, batches."""

    def validate(self) -> None:
        self.corpus.require_text()


@dataclass(frozen=True)
class InspectJob:
    """Show what a store or a context holds. Starts no cluster."""

    store: StoreConfig = field(default_factory=StoreConfig)
    """Which store and context."""

    all: bool = False
    """List every context of the store instead of one."""

    documents: int = 10
    """How many documents to list, newest first."""

    node: str = ""
    """`lod:index` of one node to show: its span, documents and text."""

    base_lm: BaseLMConfig = field(default_factory=BaseLMConfig)
    """Whose tokenizer turns a node's tokens back into text."""

    json: bool = False
    """Print JSON instead of tables."""


@dataclass(frozen=True)
class TreeVerifyJob:
    """Check every byte and relation of a context, and with `gists` what gists say; exit code 5 when one is wrong."""

    store: StoreConfig = field(default_factory=StoreConfig)
    """Which store and context."""
    gists: int = 0
    """Besides, make so many groups of 32 nodes of every level anew, drawn at random, from their tokens or children, and
    compare them: bytes may be as they were written and yet not what the net makes. 0: none."""
    seed: int = 0
    """Of the draw."""
    base_lm: BaseLMConfig = field(default_factory=BaseLMConfig)
    """The language model that the tree was made with; loaded only with `gists`."""
    gistnet: GistNetConfig = field(default_factory=GistNetConfig)
    """The net that made the gists; another one is refused."""
    threads: int = 1
    """CPU threads for making gists."""
    json: bool = False
    """Print JSON instead of tables."""

    def validate(self) -> None:
        require(self.gists >= 0, f"gists={self.gists} must be 0 (none) or more")
        require(self.threads >= 1, f"threads={self.threads} must be at least 1")


@dataclass(frozen=True)
class TreeRebuildGistsJob:
    """Re-derive every level from the stored tokens with another GistNet, into a new version."""

    run: RunConfig = field(default_factory=RunConfig)
    """Where the run's report goes."""
    ray: RayConfig = field(default_factory=RayConfig)
    """The cluster."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow."""
    base_lm: BaseLMConfig = field(default_factory=BaseLMConfig)
    """The frozen language model; must be the one the tree's tokens were made for."""
    gistnet: GistNetConfig = field(default_factory=GistNetConfig)
    """The new compressor."""
    store: StoreConfig = field(default_factory=StoreConfig)
    """Which store and context; gist_dtype is that of the new gists."""
    compaction: CompactionConfig = field(default_factory=CompactionConfig)
    """Workers and batches (the feed is always `actors`)."""


JobConfig = CompactJob | InspectJob | TreeVerifyJob | TreeRebuildGistsJob


def validate_sections(job: object) -> None:
    """Run `validate` of every section of a job, then that of the job itself where it has one.

    Raises:
        ConfigError: naming the key, the value found and what would work.
    """
    for section in (*vars(job).values(), job):
        check = getattr(section, "validate", None)
        if callable(check):
            check()
    base_lm = getattr(job, "base_lm", None)
    if isinstance(base_lm, BaseLMConfig):
        require(
            not base_lm.adapter or getattr(job, "reads_with_adapter", False),
            f"base_lm.adapter={base_lm.adapter!r} would do nothing here: this job's model stays as it is, only "
            "`evaluate gist` reads with an adapter. Leave it out",
        )

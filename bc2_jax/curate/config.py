"""What a curation run does, with every threshold."""

from __future__ import annotations

import dataclasses

from bc2_jax.curate.boilerplate import BoilerplateConfig
from bc2_jax.curate.contamination import ContaminationConfig
from bc2_jax.curate.embedding import EmbeddingConfig
from bc2_jax.curate.heuristics import HeuristicsConfig
from bc2_jax.curate.inputs import ReadConfig
from bc2_jax.curate.privacy import PrivacyConfig
from bc2_jax.curate.safety import SafetyConfig
from bc2_jax.curate.sentences import SentenceConfig
from bc2_jax.curate.spam import SpamConfig
from bc2_jax.curate.weights import WeightsConfig
from bc2_jax.validation import require, require_positive

# The sum of more points of k-means, of at most 2^11 units each, would not fit an int32.
_MOST_POINTS = 2**20 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class CopiesConfig:
    """Which copies go (paper section 2.1): of whole documents, of their paragraphs and sentences, and near copies."""

    exact: bool = True
    """Drop documents whose normalised text occurred before."""
    shortest_paragraph: int = 40
    """Characters of the shortest paragraph that is cut where it occurred before; 0 cuts none."""
    shortest_sentence: int = 40
    """The same for sentences; 0 cuts none."""
    sentence_copies: int = 4
    """A sentence is cut, but for the first, if it occurs at least so often in all documents."""
    whole_languages: tuple[str, ...] = ("code",)
    """Languages whose documents are never cut into."""
    least_left: float = 0.3
    """A document of which a smaller share is left after cutting is dropped."""
    least_left_bytes: int = 100
    """A document that was cut and is shorter is dropped."""
    near: bool = True
    """Drop near copies that MinHash finds."""
    least_similarity: float = 0.53
    """What goes has at least this Jaccard similarity of five-token shingles, estimated, to the document that stays. The
    estimate errs by .04: with a bound of .5, among many documents from one template one in fifteen would be less
    similar than that (benchmarks/curation.py)."""

    def __post_init__(self) -> None:
        for field in ("shortest_paragraph", "shortest_sentence", "least_left_bytes"):
            require(getattr(self, field) >= 0, f"copies.{field}", getattr(self, field), "it must be at least 0")
        require(self.sentence_copies >= 2, "copies.sentence_copies", self.sentence_copies, "it must be at least 2")
        for field in ("least_left", "least_similarity"):
            value = getattr(self, field)
            require(0 <= value <= 1, f"copies.{field}", value, "it must be in 0..1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QualityConfig:
    """Where scores come from. Without a model they say how far a document is from the limits of the heuristics."""

    model: str | None = None
    """.npz written by tools/train_quality.py."""
    min_score: float = 0.0
    """Documents with a lower score are dropped."""
    language_model: str | None = None
    """Checkpoint or folder in the released layout whose bits a byte the model was trained with."""
    max_tokens: int = 512
    """Tokens of a document that the language model reads."""

    def __post_init__(self) -> None:
        require(0 <= self.min_score <= 1, "quality.min_score", self.min_score, "it must be in 0..1")
        require(self.max_tokens >= 2, "quality.max_tokens", self.max_tokens, "it must be at least 2")
        if self.language_model is not None:
            require(self.model is not None, "quality.language_model", self.language_model, "it needs quality.model")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Spherical k-means."""

    clusters: int = 0
    """Number of clusters; 0 takes the power of two next below one for `documents_per_cluster` documents."""
    documents_per_cluster: int = 128
    """Mean size of a cluster where `clusters` is 0. The time to find near-duplicates grows with it, that to find the
    centroids falls."""
    most_clusters: int = 4096
    """Upper bound where `clusters` is 0."""
    sample: int = 65_536
    """Documents, drawn at random, that the centroids are computed from; all are then assigned to one."""
    iterations: int = 8
    """Upper bound of passes over the sample."""
    tolerance: float = 0.01
    """Stops when a pass moved less than this share of the sample to another cluster."""
    seed: int = 0
    """Draws the sample, the first centroids and new ones for clusters that became empty."""

    def __post_init__(self) -> None:
        require(
            self.clusters >= 0, "clusters.clusters", self.clusters, "it must be positive, or 0 for a choice by size"
        )
        require_positive(self, "clusters.", "documents_per_cluster", "most_clusters", "sample", "iterations")
        require(self.sample <= _MOST_POINTS, "clusters.sample", self.sample, f"it must be at most {_MOST_POINTS}")
        require(0 <= self.tolerance < 1, "clusters.tolerance", self.tolerance, "it must be in [0, 1)")
        require(0 <= self.seed < 2**63, "clusters.seed", self.seed, "it must be in 0..2^63 - 1")

    def number(self, documents: int) -> int:
        """Clusters for so many documents, never more than documents."""
        wanted = self.clusters or min(max(documents // self.documents_per_cluster, 1), self.most_clusters)
        return min(wanted if self.clusters else 1 << (wanted.bit_length() - 1), max(documents, 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseConfig:
    """Near-duplicates in feature space."""

    enabled: bool = True
    """Drop near copies that dense features find; clusters and weights are made in any case."""
    clusters_per_document: int = 2
    """Two documents are compared if they share one of so many nearest clusters each, for a boundary may run between
    them."""
    cosine: float = 0.85
    """Pairs at least so similar are candidates. The default is for hashed n-grams; hidden states lie closer."""
    jaccard: float = 0.53
    """Candidates with at least this (estimated) Jaccard similarity of shingles are near-duplicates."""
    most_earlier: int = 16
    """Of more earlier near-duplicates of a document, the earliest so many are kept. They are enough to decide that it
    goes, and a thousand texts from one template do not make half a million pairs."""

    def __post_init__(self) -> None:
        require_positive(self, "dense.", "clusters_per_document", "most_earlier")
        require(0 < self.cosine <= 1, "dense.cosine", self.cosine, "it must be in (0, 1]")
        require(0 <= self.jaccard <= 1, "dense.jaccard", self.jaccard, "it must be in [0, 1]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurationConfig:
    """A run of tools/curate.py, in the order of its stages."""

    read: ReadConfig = dataclasses.field(default_factory=ReadConfig)
    privacy: PrivacyConfig = dataclasses.field(default_factory=PrivacyConfig)
    boilerplate: BoilerplateConfig = dataclasses.field(default_factory=BoilerplateConfig)
    heuristics: HeuristicsConfig = dataclasses.field(default_factory=HeuristicsConfig)
    spam: SpamConfig = dataclasses.field(default_factory=SpamConfig)
    sentences: SentenceConfig = dataclasses.field(default_factory=SentenceConfig)
    quality: QualityConfig = dataclasses.field(default_factory=QualityConfig)
    safety: SafetyConfig = dataclasses.field(default_factory=SafetyConfig)
    copies: CopiesConfig = dataclasses.field(default_factory=CopiesConfig)
    contamination: ContaminationConfig = dataclasses.field(default_factory=ContaminationConfig)
    embedding: EmbeddingConfig = dataclasses.field(default_factory=EmbeddingConfig)
    clusters: ClusterConfig = dataclasses.field(default_factory=ClusterConfig)
    dense: DenseConfig = dataclasses.field(default_factory=DenseConfig)
    weights: WeightsConfig = dataclasses.field(default_factory=WeightsConfig)
    jsonl: bool = True
    """Write the documents as JSON lines too."""

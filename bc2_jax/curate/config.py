"""Settings of a curation run; the settings of a rule are defined beside the rule."""

from __future__ import annotations

import dataclasses

from bc2_jax.curate.contamination import ContaminationConfig
from bc2_jax.curate.cuts import BoilerplateConfig, SentenceConfig
from bc2_jax.curate.features import EmbeddingConfig
from bc2_jax.curate.heuristics import HeuristicsConfig
from bc2_jax.curate.inputs import ReadConfig
from bc2_jax.curate.privacy import PrivacyConfig
from bc2_jax.curate.safety import SafetyConfig
from bc2_jax.curate.spam import SpamConfig
from bc2_jax.curate.weights import WeightsConfig
from bc2_jax.validation import require, require_positive

# Sums of more points, of at most 2^11 units each, would overflow int32.
_MOST_POINTS = 2**20 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class CopiesConfig:
    """Copies to remove (paper section 2.1): whole documents, near copies, paragraphs and sentences."""

    exact: bool = True
    """Drop documents whose normalised text occurred before."""
    shortest_paragraph: int = 40
    """Characters of the shortest paragraph that is cut if it occurred before; 0 cuts none."""
    shortest_sentence: int = 40
    """The same for sentences; 0 cuts none."""
    sentence_copies: int = 4
    """A sentence that occurs at least this often in all documents is cut, except its first occurrence."""
    whole_languages: tuple[str, ...] = ("code",)
    """Languages from whose documents nothing is cut."""
    least_left: float = 0.3
    """A document is dropped if cutting leaves a smaller share of it."""
    least_left_bytes: int = 100
    """A document is dropped if cutting leaves fewer bytes."""
    near: bool = True
    """Drop near copies found by MinHash."""
    least_similarity: float = 0.53
    """Minimum estimated Jaccard similarity of five-token shingles between a dropped document and the one kept. The
    estimate errs by .04: at .5, one in fifteen documents dropped from a large template would be less similar
    (benchmarks/curation.py)."""

    def __post_init__(self) -> None:
        for field in ("shortest_paragraph", "shortest_sentence", "least_left_bytes"):
            require(getattr(self, field) >= 0, f"copies.{field}", getattr(self, field), "it must be at least 0")
        require(self.sentence_copies >= 2, "copies.sentence_copies", self.sentence_copies, "it must be at least 2")
        for field in ("least_left", "least_similarity"):
            value = getattr(self, field)
            require(0 <= value <= 1, f"copies.{field}", value, "it must be in 0..1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class QualityConfig:
    """Scores. Without a model they are the distance of a document from the limits of the heuristics."""

    model: str | None = None
    """.npz written by tools/train_quality.py."""
    min_score: float = 0.0
    """Documents with a lower score are dropped."""
    language_model: str | None = None
    """Checkpoint or folder in the released layout with whose bits a byte the model was trained."""
    max_tokens: int = 512
    """The language model reads the first tokens of a document, at most this many."""

    def __post_init__(self) -> None:
        require(0 <= self.min_score <= 1, "quality.min_score", self.min_score, "it must be in 0..1")
        require(self.max_tokens >= 2, "quality.max_tokens", self.max_tokens, "it must be at least 2")
        if self.language_model is not None:
            require(self.model is not None, "quality.language_model", self.language_model, "it needs quality.model")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """Spherical k-means."""

    clusters: int = 0
    """Number of clusters; 0 takes the largest power of two with at least `documents_per_cluster` documents each."""
    documents_per_cluster: int = 128
    """Mean size of a cluster if `clusters` is 0. In larger clusters near copies take longer to find; the centroids take
    less time."""
    most_clusters: int = 4096
    """Maximum number if `clusters` is 0."""
    sample: int = 65_536
    """Documents, drawn at random, from which the centroids are computed."""
    iterations: int = 8
    """Maximum number of passes over the sample."""
    tolerance: float = 0.01
    """Stop when a pass moves less than this share of the sample to another cluster."""
    seed: int = 0
    """Seed of the sample, the first centroids and the new ones of empty clusters."""

    def __post_init__(self) -> None:
        require(
            self.clusters >= 0, "clusters.clusters", self.clusters, "it must be positive, or 0 for a choice by size"
        )
        require_positive(self, "clusters.", "documents_per_cluster", "most_clusters", "sample", "iterations")
        require(self.sample <= _MOST_POINTS, "clusters.sample", self.sample, f"it must be at most {_MOST_POINTS}")
        require(0 <= self.tolerance < 1, "clusters.tolerance", self.tolerance, "it must be in [0, 1)")
        require(0 <= self.seed < 2**63, "clusters.seed", self.seed, "it must be in 0..2^63 - 1")

    def number(self, documents: int) -> int:
        """Clusters for this number of documents, at most one a document."""
        wanted = self.clusters or min(max(documents // self.documents_per_cluster, 1), self.most_clusters)
        return min(wanted if self.clusters else 1 << (wanted.bit_length() - 1), max(documents, 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseConfig:
    """Near copies by dense features."""

    enabled: bool = True
    """Drop near copies found by dense features; clusters and weights are computed in any case."""
    clusters_per_document: int = 2
    """Documents are compared if they share one of this many nearest clusters: copies may lie on both sides of a
    boundary."""
    cosine: float = 0.85
    """Minimum cosine of a candidate pair. The default is for hashed n-grams; hidden states are more similar."""
    jaccard: float = 0.53
    """Minimum estimated Jaccard similarity of shingles of a candidate to be a near copy."""
    most_earlier: int = 16
    """Pairs kept for a document: its earliest near copies. They are enough to drop it, and a thousand texts from one
    template do not make half a million pairs."""

    def __post_init__(self) -> None:
        require_positive(self, "dense.", "clusters_per_document", "most_earlier")
        require(0 < self.cosine <= 1, "dense.cosine", self.cosine, "it must be in (0, 1]")
        require(0 <= self.jaccard <= 1, "dense.jaccard", self.jaccard, "it must be in [0, 1]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurationConfig:
    """Settings of a curation run."""

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
    """Whether to write the documents as JSON lines too."""

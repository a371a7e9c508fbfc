"""Settings of the sentiment run."""
from dataclasses import dataclass, field


@dataclass
class EncoderConfig:
    vocab_size: int = 120
    hidden_size: int = 32
    layers: int = 2
    heads: int = 2
    intermediate: int = 48
    max_positions: int = 24
    dropout: float = 0.1


@dataclass
class RunConfig:
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    labels: tuple = ("negative", "neutral", "positive")
    train_size: int = 96
    eval_size: int = 32
    seq_len: int = 16
    batch_size: int = 8
    max_steps: int = 18
    eval_every: int = 6
    learning_rate: float = 2e-3
    warmup_steps: int = 2
    label_smoothing: float = 0.05
    ordinal_weight: float = 0.3
    drift_limit: float = 0.8
    frozen_prefixes: tuple = ("bert.embeddings.position_embeddings",)
    seed: int = 13

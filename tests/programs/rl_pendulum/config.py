"""Settings of the actor-critic run."""
from dataclasses import dataclass


@dataclass
class AgentConfig:
    hidden: int = 32
    gamma: float = 0.95
    tau: float = 0.05
    actor_lr: float = 3e-3
    critic_lr: float = 5e-3
    entropy_weight: float = 0.02
    log_std_min: float = -4.0
    log_std_max: float = 0.5
    clip: float = 5.0


@dataclass
class RunConfig:
    agent: AgentConfig
    episodes: int = 6
    horizon: int = 40
    warmup_steps: int = 40
    batch_size: int = 32
    updates_per_episode: int = 6
    capacity: int = 1000
    seed: int = 17

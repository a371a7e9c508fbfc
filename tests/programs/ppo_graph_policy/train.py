"""Proximal policy optimisation of a graph walker."""

from __future__ import annotations

import logging
import tempfile
from collections import deque
from pathlib import Path

import torch
from buffer import Rollout
from config import PPOConfig, parse
from model import ActorCritic
from world import GraphWorld

log = logging.getLogger("ppo")


class Agent:
    def __init__(self, cfg: PPOConfig):
        self.cfg, self.world = cfg, GraphWorld(cfg.world)
        self.net = ActorCritic(cfg, self.world.edges, self.world.table)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=cfg.lr, eps=1e-5)
        total = cfg.total_updates
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda i: max(0.0, 1.0 - i / total))
        self.rewards: deque[float] = deque(maxlen=3)

    @torch.no_grad()
    def collect(self) -> tuple[Rollout, torch.Tensor]:
        rollout = Rollout()
        for _ in range(self.cfg.horizon):
            obs, mask = self.world.observation, self.world.mask
            policy, value = self.net(obs, mask)
            action = policy.sample()
            reward, done = self.world.step(action)
            logp = policy.log_prob(action)
            rollout.add(obs=obs, mask=mask, action=action, logp=logp, value=value, reward=reward, done=done)
        _, last = self.net(self.world.observation, self.world.mask)
        self.rewards.append(rollout.stacked("reward").mean().item())
        return rollout, rollout.advantages(last, self.cfg.gamma, self.cfg.lam)

    def losses(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        cfg = self.cfg
        policy, value = self.net(batch["obs"], batch["mask"])
        log_ratio = policy.log_prob(batch["action"]) - batch["logp"].detach()
        ratio = log_ratio.exp()
        advantage = batch["advantage"].detach()
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        clipped = ratio.clamp(1.0 - cfg.clip, 1.0 + cfg.clip)
        policy_loss = -torch.min(ratio * advantage, clipped * advantage).mean()
        near = batch["value"] + (value - batch["value"]).clamp(-cfg.clip, cfg.clip)
        errors = torch.max((value - batch["returns"]) ** 2, (near - batch["returns"]) ** 2)
        value_loss = 0.5 * errors.mean()
        entropy = policy.entropy().mean()
        with torch.no_grad():
            kl = ((ratio - 1.0) - log_ratio).mean().item()
            outside = ((ratio - 1.0).abs() > cfg.clip).float().mean().item()
        total = policy_loss + cfg.value_coef * value_loss - cfg.entropy_coef * entropy
        return total, {"kl": kl, "clipped": outside, "value": value_loss.item(), "entropy": entropy.item()}

    def improve(self, rollout: Rollout, advantage: torch.Tensor) -> dict[str, float]:
        stats: dict[str, float] = {}
        for _ in range(self.cfg.epochs):
            for batch in rollout.minibatches(advantage, self.cfg.minibatches):
                loss, stats = self.losses(batch)
                self.optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.cfg.max_norm)
                self.optimizer.step()
                self.schedule.step()
            if stats["kl"] > self.cfg.target_kl:
                break
        return stats

    @torch.no_grad()
    def evaluate(self, steps: int = 12) -> float:
        """Share of greedy moves that reach the goal."""
        world, hits = GraphWorld(self.cfg.world), 0.0
        for _ in range(steps):
            policy, _ = self.net(world.observation, world.mask)
            reward, _ = world.step(policy.logits.argmax(dim=-1))
            hits += (reward > 0).float().mean().item()
        return hits / steps


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    cfg = parse()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    agent = Agent(cfg)
    best = float("-inf")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "best.pt"
        for iteration in range(cfg.iterations):
            stats = agent.improve(*agent.collect())
            score = agent.evaluate()
            if score > best:
                best = score
                torch.save(agent.net.state_dict(), path)
            shown = {k: round(v, 4) for k, v in stats.items()}
            log.info("iteration %d reward %.3f greedy %.3f %s", iteration, agent.rewards[-1], score, shown)
        agent.net.load_state_dict(torch.load(path, weights_only=True))
    log.info("best %.3f again %.3f", best, agent.evaluate())


if __name__ == "__main__":
    main()

"""Swings up a pendulum with an off-policy actor-critic."""
import argparse
import logging
import os
import tempfile

import torch

from agent import ActorCritic
from config import AgentConfig, RunConfig
from envs import Memory, Pendulum
from policies import DiscretePolicy

torch.set_num_threads(1)
log = logging.getLogger("pendulum")


def collect(env, policy, memory, limit=None):
    obs, done, total, steps = env.reset(), False, 0.0, 0
    while not done and (limit is None or steps < limit):
        action = policy.act(obs)
        following, reward, done = env.step(action)
        memory.add(obs, action, reward, following)
        obs = following
        total += reward
        steps += 1
    return total


@torch.no_grad()
def evaluate(env, policy, episodes=2):
    total = 0.0
    for _ in range(episodes):
        obs, done = env.reset(), False
        while not done:
            obs, reward, done = env.step(policy.act(obs, greedy=True))
            total += reward
    return total / episodes


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--episodes", type=int, default=RunConfig.episodes)
    parser.add_argument("--entropy-weight", type=float, default=AgentConfig.entropy_weight)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")

    cfg = RunConfig(AgentConfig(entropy_weight=options.entropy_weight), episodes=options.episodes)
    torch.manual_seed(cfg.seed)
    env, test_env = Pendulum(cfg.horizon, cfg.seed), Pendulum(cfg.horizon, cfg.seed + 1)
    memory = Memory(cfg.capacity, cfg.seed)
    agent = ActorCritic(env.obs_size, env.action_size, cfg.agent)
    explorer = DiscretePolicy([-1.0, -0.3, 0.3, 1.0])
    collect(env, explorer, memory, cfg.warmup_steps)

    for episode in range(cfg.episodes):
        score = collect(env, agent.actor, memory)
        rows = [agent.update(memory.sample(cfg.batch_size)) for _ in range(cfg.updates_per_episode)]
        means = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
        text = ", ".join(f"{key} {value:.4f}" for key, value in means.items())
        log.info("episode %d: return %.2f, %s", episode, score, text)
    log.info("greedy return %.2f over %d transitions", evaluate(test_env, agent.actor), len(memory))
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "actor.pt")
        torch.save(agent.actor.state_dict(), path)
        log.info("actor saved, %d bytes", os.path.getsize(path))


if __name__ == "__main__":
    main()

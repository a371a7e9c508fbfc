"""Off-policy actor-critic with twin critics and a slow target."""
import copy
from contextlib import contextmanager

import torch

from policies import GaussianPolicy, TwinCritic, squashed_entropy


@contextmanager
def frozen(module):
    module.requires_grad_(False)
    try:
        yield module
    finally:
        module.requires_grad_(True)


class ActorCritic:
    def __init__(self, obs_size, action_size, cfg):
        self.cfg = cfg
        self.actor = GaussianPolicy(obs_size, action_size, cfg)
        self.critic = TwinCritic(obs_size, action_size, cfg.hidden)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self.actor_opt = torch.optim.Adam(self.actor.parameters(), lr=cfg.actor_lr)
        self.critic_opt = torch.optim.Adam(self.critic.parameters(), lr=cfg.critic_lr)

    @torch.no_grad()
    def _bellman(self, reward, following):
        action, dist = self.actor(following)
        value = self.target(following, action).amin(0)
        return reward + self.cfg.gamma * (value + self.cfg.entropy_weight * squashed_entropy(dist))

    def _critic_update(self, obs, action, reward, following):
        loss = self.critic.loss(obs, action, self._bellman(reward, following))
        self.critic_opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.critic.parameters(), self.cfg.clip)
        self.critic_opt.step()
        return loss.item()

    def _actor_update(self, obs):
        with frozen(self.critic):
            action, dist = self.actor(obs)
            value = self.critic(obs, action).amin(0)
            entropy = squashed_entropy(dist)
            loss = -(value + self.cfg.entropy_weight * entropy).mean()
            self.actor_opt.zero_grad()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.actor.parameters(), self.cfg.clip)
        self.actor_opt.step()
        return loss.item(), entropy.mean().item()

    def update(self, batch):
        obs, action, reward, following = batch
        critic_loss = self._critic_update(obs, action, reward, following)
        actor_loss, entropy = self._actor_update(obs)
        with torch.no_grad():
            for slow, fast in zip(self.target.parameters(), self.critic.parameters()):
                slow.data.lerp_(fast.data, self.cfg.tau)
        return {"critic": critic_loss, "actor": actor_loss, "entropy": entropy}

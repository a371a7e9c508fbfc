"""Stochastic policies. A policy gives a distribution; the base class draws from it."""
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Categorical, Normal


class StochasticPolicy(nn.Module):
    """Base of all policies.

    Subclasses implement `distribution` and may override `squash`, the map from the drawn value to
    the action.
    """

    differentiable = False

    def distribution(self, obs):
        raise NotImplementedError

    def squash(self, raw):
        return raw

    def draw(self, obs):
        dist = self.distribution(obs)
        raw = dist.rsample() if self.differentiable else dist.sample()
        return self.squash(raw), dist

    def forward(self, obs):
        return self.draw(obs)

    @torch.no_grad()
    def act(self, obs, greedy=False):
        if greedy:
            return self.greedy(obs)
        return self.draw(obs)[0]

    @torch.no_grad()
    def greedy(self, obs):
        raise NotImplementedError


class DiscretePolicy(StochasticPolicy):
    """A choice among a few torques, used for the warm-up episodes."""

    def __init__(self, torques):
        super().__init__()
        self.register_buffer("torques", torch.tensor(torques))
        self.logits = nn.Parameter(torch.zeros(len(torques)), requires_grad=False)

    def distribution(self, obs):
        return Categorical(logits=self.logits.expand(*obs.shape[:-1], -1))

    def squash(self, raw):
        return self.torques[raw].unsqueeze(-1)

    @torch.no_grad()
    def greedy(self, obs):
        return self.torques[self.distribution(obs).probs.argmax(-1)].unsqueeze(-1)


class GaussianPolicy(StochasticPolicy):
    """Tanh-squashed Gaussian with a state-dependent width."""

    def __init__(self, obs_size, action_size, cfg):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(obs_size, cfg.hidden), nn.Tanh(),
                                   nn.Linear(cfg.hidden, cfg.hidden), nn.Tanh())
        self.mean = nn.Linear(cfg.hidden, action_size)
        self.width = nn.Linear(cfg.hidden, action_size)
        self.low, self.high = cfg.log_std_min, cfg.log_std_max
        self.mean.weight.data.mul_(0.1)
        self.width.weight.data.mul_(0.1)

    def distribution(self, obs):
        h = self.trunk(obs)
        share = 0.5 * (torch.tanh(self.width(h)) + 1.0)
        log_std = self.low + share * (self.high - self.low)
        return Normal(self.mean(h), log_std.exp())

    def squash(self, raw):
        return torch.tanh(raw)

    @torch.no_grad()
    def greedy(self, obs):
        return self.squash(self.distribution(obs).mean)


def squashed_entropy(dist):
    """Entropy of the Gaussian before the squashing, less the part that is constant."""
    constant = 0.5 * math.log(2 * math.pi * math.e)
    return (dist.entropy() - constant).sum(-1)


class TwinCritic(nn.Module):
    def __init__(self, obs_size, action_size, hidden):
        super().__init__()
        self.nets = nn.ModuleList([
            nn.Sequential(nn.Linear(obs_size + action_size, hidden), nn.SiLU(),
                          nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, 1))
            for _ in range(2)
        ])

    def forward(self, obs, action):
        x = torch.cat([obs, action], dim=-1)
        return torch.stack([net(x).squeeze(-1) for net in self.nets])

    def loss(self, obs, action, target):
        guess = self(obs, action)
        return F.smooth_l1_loss(guess, target.expand_as(guess))

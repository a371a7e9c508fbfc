"""A damped pendulum with a torque, and a replay memory."""
import math

import torch


class Pendulum:
    """State (angle, speed); the reward is highest when the pendulum stands still upright."""

    obs_size, action_size = 3, 1

    def __init__(self, horizon, seed):
        self.horizon = horizon
        self.gen = torch.Generator().manual_seed(seed)
        self.angle = self.speed = 0.0
        self.time = 0

    def _observe(self):
        return torch.tensor([math.cos(self.angle), math.sin(self.angle), self.speed / 4.0])

    def reset(self):
        noise = torch.rand(2, generator=self.gen).tolist()
        self.angle = math.pi * (2 * noise[0] - 1)
        self.speed = 2 * noise[1] - 1
        self.time = 0
        return self._observe()

    def step(self, action):
        torque = 2.0 * max(-1.0, min(1.0, float(action[0])))
        wrapped = (self.angle + math.pi) % (2 * math.pi) - math.pi
        reward = -(wrapped ** 2 + 0.1 * self.speed ** 2 + 0.01 * torque ** 2) / 4.0
        self.speed = 0.98 * self.speed + 0.1 * (3.0 * math.sin(self.angle) + torque)
        self.speed = max(-6.0, min(6.0, self.speed))
        self.angle += 0.1 * self.speed
        self.time += 1
        return self._observe(), reward, self.time >= self.horizon


class Memory:
    def __init__(self, capacity, seed):
        self.capacity = capacity
        self.rows = []
        self.gen = torch.Generator().manual_seed(seed)

    def add(self, obs, action, reward, following):
        row = (obs, action.detach(), torch.tensor(reward, dtype=torch.float32), following)
        self.rows.append(row)
        if len(self.rows) > self.capacity:
            self.rows.pop(0)

    def sample(self, size):
        index = torch.randint(len(self.rows), (size,), generator=self.gen).tolist()
        return tuple(torch.stack(column) for column in zip(*(self.rows[i] for i in index)))

    def __len__(self):
        return len(self.rows)

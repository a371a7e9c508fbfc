"""Birds: a picture, a caption and a call, all drawn from one hidden species vector."""
import torch


class BirdSource:
    def __init__(self, cfg, seed):
        towers = cfg.towers
        fixed = torch.Generator().manual_seed(101)
        self.species = cfg.species
        self.side = towers["image"].size
        self.vocab = towers["caption"].size
        self.pictures = torch.randn(cfg.species, 1, self.side, self.side, generator=fixed)
        self.words = torch.randint(2, self.vocab, (cfg.species, 4), generator=fixed)
        self.calls = torch.randn(cfg.species, towers["audio"].size, generator=fixed)
        self.gen = torch.Generator().manual_seed(seed)

    def batch(self, size):
        kind = torch.randperm(self.species, generator=self.gen).repeat(size // self.species + 1)[:size]
        image = self.pictures[kind]
        image = image + 0.4 * torch.randn(image.shape, generator=self.gen)
        noise = torch.randint(2, self.vocab, (size, 2), generator=self.gen)
        caption = torch.cat([self.words[kind], noise], dim=1)
        caption[:, -1] *= torch.randint(0, 2, (size,), generator=self.gen)
        call = self.calls[kind]
        call = call + 0.4 * torch.randn(call.shape, generator=self.gen)
        return {"image": image, "caption": caption, "audio": call}, kind

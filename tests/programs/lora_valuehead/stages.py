"""What happens between steps: previews of generated text and checkpoints."""
import logging
import os

import torch

log = logging.getLogger(__name__)


class Stage:
    """Something that runs after chosen steps."""

    def __init__(self, steps):
        self.steps = frozenset(steps)

    def due(self, step):
        return step in self.steps

    def run(self, step, model):
        raise NotImplementedError


class FastDecoding:
    """Decodes with the adapters folded into the base weights, which saves two matmuls a layer."""

    def __init__(self, model):
        self.model = model
        self.was_training = model.training

    def __enter__(self):
        self.was_training = self.model.training
        self.model.eval()
        self.model.backbone.merge_adapter()
        return self.model.backbone

    def __exit__(self, *exc):
        self.model.train(self.was_training)
        return False


class PreviewStage(Stage):
    """Greedy continuation of a few prompts, scored against the right continuation."""

    def __init__(self, steps, prompts, new_tokens, vocab_size):
        super().__init__(steps)
        self.prompts = prompts
        self.new_tokens = new_tokens
        self.vocab_size = vocab_size
        self.history = []

    @torch.no_grad()
    def run(self, step, model):
        tokens = self.prompts.clone()
        with FastDecoding(model) as backbone:
            for _ in range(self.new_tokens):
                logits = backbone(input_ids=tokens).logits[:, -1]
                tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
        stride = (self.prompts[:, 1] - self.prompts[:, 0]) % self.vocab_size
        expected = (tokens[:, :-1] + stride[:, None]) % self.vocab_size
        right = (tokens[:, 1:] == expected)[:, -self.new_tokens:].float().mean().item()
        self.history.append((step, right))
        log.info("step %d: preview accuracy %.3f", step, right)


class CheckpointStage(Stage):
    def __init__(self, steps, folder):
        super().__init__(steps)
        self.folder = folder

    def run(self, step, model):
        wanted = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        torch.save(wanted, os.path.join(self.folder, f"step{step}.pt"))
        log.info("step %d: %d trainable tensors saved", step, len(wanted))

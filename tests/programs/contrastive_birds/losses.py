"""Symmetric contrastive loss over pairs of modalities with a queue of past negatives."""
import torch
import torch.nn.functional as F


class NegativeQueue:
    """Past embeddings of each modality and their species; they are constants."""

    def __init__(self, names, size):
        self.size = size
        self.rows = {name: None for name in names}
        self.kind = None

    def get(self, name):
        return None if self.kind is None else (self.rows[name], self.kind)

    def _joined(self, new, old):
        return (new if old is None else torch.cat([new, old]))[: self.size]

    def push(self, views, kind):
        for name, z in views.items():
            self.rows[name] = self._joined(z.detach(), self.rows[name])
        self.kind = self._joined(kind, self.kind)


def match(anchor, positive, kind, past, temperature, hardest=4):
    logits = anchor @ positive.t() / temperature
    same = kind[:, None] == kind[None, :]
    same.fill_diagonal_(False)
    logits = logits.masked_fill(same, float("-inf"))
    if past is not None:
        rows, past_kind = past
        other = anchor @ rows.t() / temperature
        other = other.masked_fill(kind[:, None] == past_kind[None, :], float("-inf"))
        logits = torch.cat([logits, other.topk(hardest, dim=1).values], dim=1)
    return F.cross_entropy(logits, torch.arange(len(anchor)))


def contrastive(views, kind, pairs, queue, temperature):
    terms = {}
    for left, right in pairs:
        forward = match(views[left], views[right], kind, queue.get(right), temperature)
        backward = match(views[right], views[left], kind, queue.get(left), temperature)
        terms[f"{left}-{right}"] = 0.5 * (forward + backward)
    return torch.stack(list(terms.values())).mean(), {k: v.item() for k, v in terms.items()}

"""Trainer with label smoothing and an ordinal term for the three ordered labels."""
import numpy as np
import torch
import torch.nn.functional as F
from transformers import Trainer


def ordinal_loss(logits, labels):
    """Squared distance between the expected label and the given one."""
    grid = torch.arange(logits.shape[-1], dtype=logits.dtype, device=logits.device)
    expected = (logits.softmax(-1) * grid).sum(-1)
    return F.mse_loss(expected, labels.to(logits.dtype))


class OrdinalTrainer(Trainer):
    def __init__(self, *args, label_smoothing=0.0, ordinal_weight=0.0, **kwargs):
        super().__init__(*args, **kwargs)
        self.label_smoothing = label_smoothing
        self.ordinal_weight = ordinal_weight
        self.parts = {}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"]
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        logits = outputs.logits
        ce = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        ordinal = ordinal_loss(logits, labels)
        loss = ce + self.ordinal_weight * ordinal
        with torch.no_grad():
            confidence = logits.softmax(-1).amax(-1).mean()
        self.parts = {
            "ce": ce.item(),
            "ordinal": ordinal.item(),
            "confidence": float(confidence),
        }
        return (loss, outputs) if return_outputs else loss


def compute_metrics(prediction):
    logits, labels = prediction
    guess = np.argmax(logits, axis=-1)
    return {
        "accuracy": float((guess == labels).mean()),
        "mae": float(np.abs(guess - labels).mean()),
    }

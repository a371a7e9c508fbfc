"""Reusable pieces for Lightning modules that work on gradients or weights."""
import torch


class FiniteGradientMixin:
    """Replaces non-finite entries before clipping and counts them."""

    def on_after_backward(self):
        super().on_after_backward()
        bad = 0
        for param in self.parameters():
            if param.grad is None:
                continue
            finite = torch.isfinite(param.grad)
            bad += int((~finite).sum().item())
            if not finite.all():
                param.grad.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        self.log("nonfinite", float(bad), prog_bar=False)


class GradientSmoothingMixin:
    """Exponential smoothing of the gradients of chosen parts of the model.

    `smooth_prefixes` names the parts; the first step starts from an average of zero and the
    bias of that start is taken out as in Adam.
    """

    smooth_prefixes = ()
    smooth_beta = 0.9

    def _smoothed_parameters(self):
        for name, param in self.named_parameters():
            if name.startswith(self.smooth_prefixes) and param.grad is not None:
                yield name, param

    @torch.no_grad()
    def on_before_optimizer_step(self, optimizer):
        super().on_before_optimizer_step(optimizer)
        if not hasattr(self, "_averages"):
            self._averages = {}
            self._smooth_count = 0
        self._smooth_count += 1
        correction = 1.0 - self.smooth_beta ** self._smooth_count
        for name, param in self._smoothed_parameters():
            average = self._averages.setdefault(name, torch.zeros_like(param))
            param.grad.copy_(average / correction)
            average.mul_(self.smooth_beta).add_(param.grad, alpha=1.0 - self.smooth_beta)


class WeightAverageMixin:
    """Keeps an average of the weights for validation-time export."""

    average_decay = 0.9

    @torch.no_grad()
    def on_train_batch_end(self, outputs, batch, batch_idx):
        super().on_train_batch_end(outputs, batch, batch_idx)
        shadow = self.__dict__.setdefault("_shadow", {})
        for name, param in self.named_parameters():
            if name in shadow:
                shadow[name].lerp_(param, 1.0 - self.average_decay)
            else:
                shadow[name] = param.clone()

"""Programs that clear, replace, share or keep gradients at the wrong time, the line marked, and healthy look-alikes."""

HEAD = """\
import copy
from collections import deque
import torch
from torch import nn
from torch.nn import functional as F

torch.manual_seed(0)


def net():
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def loss_of(model):
    return model(torch.randn(8, 4)).pow(2).mean()


"""

BROKEN = {
    "clears_every_microbatch": (
        "zero_grad_misplaced",
        """
def main():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for i in range(24):
        (loss_of(model) / 4).backward()
        if i % 4 == 3:
            optimizer.step()
        optimizer.zero_grad()  # cause
main()
""",
    ),
    "clears_with_zeros_before_the_step": (
        "zero_grad_misplaced",
        """
def update(optimizer):
    optimizer.zero_grad(set_to_none=False)  # cause
    optimizer.step()
def main():
    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    for i in range(6):
        loss_of(model).backward()
        update(optimizer)
main()
""",
    ),
    "hook_that_tidies_up": (
        "grad_cleared",
        """
def log(parameter):
    parameter.norm_seen = parameter.grad.norm().item()
    parameter.grad = None  # cause
def main():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for parameter in model[0].parameters():
        parameter.register_post_accumulate_grad_hook(log)
    for _ in range(6):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
main()
""",
    ),
    "evaluation_clears_the_model_from_step_nine_on": (
        "grad_cleared",
        """
class Callback:
    def after_backward(self, model, step):
        if step > 8:
            model.zero_grad()  # cause
def main():
    model, callback = net(), Callback()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(20):
        optimizer.zero_grad()
        loss_of(model).backward()
        callback.after_backward(model, step)
        optimizer.step()
main()
""",
    ),
    "log_line_at_every_fifth_step": (
        "grad_cleared",
        """
def report(model):
    for parameter in model.parameters():
        parameter.grad.detach().zero_()  # cause
def main():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(30):
        optimizer.zero_grad()
        loss_of(model).backward()
        if step % 5 == 0:
            report(model)
        optimizer.step()
main()
""",
    ),
    "cleared_in_the_first_steps_only": (
        "missing_zero_grad",
        """
def main():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(20):
        if step < 9:
            optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()  # cause
main()
""",
    ),
    "one_of_two_never_cleared": (
        "missing_zero_grad",
        """
def main():
    encoder, decoder = nn.Linear(4, 8), nn.Linear(8, 2)
    first = torch.optim.SGD(encoder.parameters(), lr=0.01)
    second = torch.optim.SGD(decoder.parameters(), lr=0.01)
    for _ in range(8):
        first.zero_grad()
        decoder(encoder(torch.randn(8, 4))).pow(2).mean().backward()
        first.step()
        second.step()  # cause
main()
""",
    ),
    "gradients_of_the_other_network": (
        "grad_overwritten",
        """
def share(source, target):
    for p, q in zip(source.parameters(), target.parameters()):
        q.grad = p.grad.clone()  # cause
def main():
    a, b = net(), net()
    optimizer = torch.optim.SGD([*a.parameters(), *b.parameters()], lr=0.1)
    for _ in range(6):
        optimizer.zero_grad()
        (loss_of(a) + loss_of(b)).backward()
        share(a, b)
        optimizer.step()
main()
""",
    ),
    "gradients_of_the_first_step": (
        "grad_overwritten",
        """
def main():
    model, kept = net(), {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(10):
        optimizer.zero_grad()
        loss_of(model).backward()
        for name, parameter in model.named_parameters():
            kept.setdefault(name, parameter.grad.clone())
            parameter.grad.copy_(kept[name])  # cause
        optimizer.step()
main()
""",
    ),
    "mask_that_lets_nothing_through": (
        "grad_overwritten",
        """
def mask_gradients(model, masks):
    for name, parameter in model.named_parameters():
        parameter.grad *= masks[name]  # cause
def main():
    model = net()
    masks = {name: (p > 10).float() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(6):
        optimizer.zero_grad()
        loss_of(model).backward()
        mask_gradients(model, masks)
        optimizer.step()
main()
""",
    ),
    "hook_of_a_weight": (
        "grad_overwritten",
        """
def mask(gradient):
    keep = torch.zeros_like(gradient)
    return gradient * keep  # cause
def main():
    model = net()
    model[0].weight.register_hook(mask)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(6):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
main()
""",
    ),
    "two_tasks_compared_without_a_copy": (
        "grad_aliased",
        """
def main():
    model, dots = net(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(6):
        optimizer.zero_grad(set_to_none=False)
        loss_of(model).backward()
        first = [p.grad for p in model.parameters()]  # cause
        optimizer.zero_grad(set_to_none=False)
        loss_of(model).backward()
        second = [p.grad for p in model.parameters()]
        dots.append(sum((a * b).sum() for a, b in zip(first, second)).item())
        optimizer.step()
main()
""",
    ),
    "saliency_of_a_result": (
        "non_leaf_grad",
        """
def main():
    model = net()
    image = torch.rand(3, 4, requires_grad=True)
    image = image * 0.5  # cause
    model(image).sum().backward()
    print(image.grad)
main()
""",
    ),
    "losses_in_a_list": (
        "history_kept",
        """
class Trainer:
    def __init__(self):
        self.model, self.losses = net(), []
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
    def step(self):
        loss = loss_of(self.model)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss)  # cause
def main():
    trainer = Trainer()
    for _ in range(14):
        trainer.step()
main()
""",
    ),
    "local_list": (
        "history_kept",
        """
def main():
    model, curve = net(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(14):
        loss = loss_of(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss)  # cause
    return curve
main()
""",
    ),
    "moving_average_of_the_loss": (
        "history_kept",
        """
class Smooth:
    value = 0.0
    def update(self, loss):
        self.value = 0.9 * self.value + 0.1 * loss  # cause
def main():
    model, smooth = net(), Smooth()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(14):
        loss = loss_of(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        smooth.update(loss)
main()
""",
    ),
}

HEALTHY = {
    "accumulation": """
def main():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for i in range(24):
        (loss_of(model) / 4).backward()
        if i % 4 == 3:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
main()
""",
    "a_slow_and_a_fast_optimizer": """
def main():
    a, b = nn.Linear(4, 4), nn.Linear(4, 1)
    fast, slow = torch.optim.SGD(a.parameters(), lr=0.1), torch.optim.Adam(b.parameters())
    for i in range(16):
        b(a(torch.randn(8, 4))).pow(2).mean().backward()
        fast.step()
        fast.zero_grad()
        if i % 4 == 3:
            slow.step()
            for p in b.parameters():
                p.grad.detach_().zero_()
main()
""",
    "an_optimizer_that_clears_itself": """
class Once(torch.optim.SGD):
    def step(self, closure=None):
        out = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.zero_()
        return out
def main():
    model = net()
    optimizer = Once(model.parameters(), lr=0.1)
    for _ in range(8):
        loss_of(model).backward()
        optimizer.step()
main()
""",
    "gradient_surgery_and_momentum": """
def main():
    model, momentum = net(), {}
    optimizer = torch.optim.Adam(model.parameters())
    params = list(model.parameters())
    for _ in range(8):
        out, both = model(torch.randn(8, 4)), []
        for task in range(2):
            optimizer.zero_grad()
            out[:, task].pow(2).mean().backward(retain_graph=True)
            both.append([p.grad.clone() for p in params])
        for p, a, b in zip(params, *both):
            p.grad = a + b - ((a * b).sum().clamp(max=0) / (b.norm() ** 2 + 1e-6)) * b
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        for index, p in enumerate(params):
            held = momentum.setdefault(index, torch.zeros_like(p))
            held.mul_(0.9).add_(p.grad)
            p.grad.copy_(held).add_(1e-3 * torch.randn_like(p))
        optimizer.step()
main()
""",
    "flat_buffer": """
def main():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(6):
        optimizer.zero_grad()
        loss_of(model).backward()
        flat = torch.cat([p.grad.flatten() for p in model.parameters()])
        flat = flat / flat.norm().clamp(min=1.0)
        for p, part in zip(model.parameters(), flat.split([p.numel() for p in model.parameters()])):
            p.grad = part.view_as(p)
        optimizer.step()
main()
""",
    "sharpness_aware": """
def main():
    model = net()
    params = list(model.parameters())
    optimizer = torch.optim.SGD(params, lr=0.1)
    for _ in range(6):
        x = torch.randn(8, 4)
        model(x).pow(2).mean().backward()
        with torch.no_grad():
            norm = torch.stack([p.grad.norm() for p in params]).norm()
            away = [0.05 * p.grad / (norm + 1e-9) for p in params]
            for p, e in zip(params, away):
                p.add_(e)
        optimizer.zero_grad()
        model(x).pow(2).mean().backward()
        with torch.no_grad():
            for p, e in zip(params, away):
                p.sub_(e)
        optimizer.step()
        optimizer.zero_grad()
main()
""",
    "last_layer_frozen_at_first": """
def main():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(12):
        optimizer.zero_grad()
        loss_of(model).backward()
        if step < 4:
            for p in model[2].parameters():
                p.grad = None
        optimizer.step()
main()
""",
    "steps_inside_of_backward": """
def main():
    model = net()
    optimizers = {p: torch.optim.SGD([p], lr=0.01) for p in model.parameters()}
    def step(p):
        optimizers[p].step()
        optimizers[p].zero_grad()
    hooks = [p.register_post_accumulate_grad_hook(step) for p in model.parameters()]
    for _ in range(6):
        loss_of(model).backward()
    for hook in hooks:
        hook.remove()
main()
""",
    "norms_of_live_gradients": """
def main():
    model, norms = net(), []
    params = list(model.parameters())
    optimizer = torch.optim.SGD(params, lr=0.1)
    live = None
    for _ in range(8):
        optimizer.zero_grad(set_to_none=False)
        loss_of(model).backward()
        if live is None:
            live = [p.grad for p in params]
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        norms.append(sum((g * g).sum() for g in live).item())
        optimizer.step()
    old = None
    for _ in range(8):
        optimizer.zero_grad()
        loss_of(model).backward()
        new = [p.grad for p in params]
        if old is not None:
            norms.append(sum((a * b).sum() for a, b in zip(old, new)).item())
        old = new
        optimizer.step()
main()
""",
    "losses_of_one_step_and_a_window": """
def main():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recent, curve, average = deque(maxlen=4), [], 0.0
    for _ in range(20):
        parts = []
        optimizer.zero_grad()
        for _ in range(4):
            loss = loss_of(model) / 4
            loss.backward()
            parts.append(loss)
        optimizer.step()
        recent.append(parts[-1])
        curve.append(sum(parts).item())
        average = 0.9 * average + 0.1 * parts[-1].detach()
main()
""",
    "two_players_cleared_before_their_steps": """
def main():
    g, d = nn.Linear(4, 4), nn.Linear(4, 1)
    og, od = torch.optim.Adam(g.parameters()), torch.optim.Adam(d.parameters())
    for _ in range(8):
        d.zero_grad()
        (d(torch.randn(8, 4)).mean() - d(torch.randn(8, 4)).mean()).backward()
        d.zero_grad()
        d(g(torch.randn(8, 4)).detach()).pow(2).mean().backward()
        od.step()
        g.zero_grad()
        (-d(g(torch.randn(8, 4)))).mean().backward()
        og.step()
main()
""",
    "closure": """
def main():
    model = net()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    x = torch.randn(8, 4)
    def closure():
        optimizer.zero_grad()
        loss = model(x).pow(2).mean()
        loss.backward()
        return loss
    for _ in range(5):
        optimizer.step(closure)
main()
""",
    "a_cycle_of_references_that_nobody_holds": """
class Value:
    def __init__(self, at):
        self.at, self.me = at, self
def main():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(14):
        value = Value(model(torch.randn(8, 4)))
        optimizer.zero_grad()
        value.at.pow(2).mean().backward()
        optimizer.step()
main()
""",
    "a_first_state_that_is_learned_in_the_first_of_every_four_windows": """
def main():
    start, cell = nn.Parameter(torch.zeros(1, 4)), nn.GRUCell(4, 4)
    optimizer = torch.optim.SGD([start, *cell.parameters()], lr=0.1)
    for _ in range(3):
        h = start.expand(8, -1)
        for _ in range(4):
            h = cell(torch.randn(8, 4), h)
            optimizer.zero_grad()
            h.pow(2).mean().backward()
            optimizer.step()
            h = h.detach()
main()
""",
}

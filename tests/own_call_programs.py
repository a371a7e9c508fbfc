"""Programs that control their gradients through gradctl's own calls: healthy, or with a bug behind a call."""

from __future__ import annotations

_HEAD = """\
import torch
from torch import nn
from torch.nn import functional as F
import gradctl
from gradctl._recompute import recompute

torch.manual_seed(0)
x, y = torch.randn(16, 4), torch.randn(16, 1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(4, 8)
        self.middle = nn.Linear(8, 8)
        self.head = nn.Linear(8, 1)

    def forward(self, x):
        h = torch.tanh(self.encoder(x))
        h = self.through(h)
        return self.head(torch.tanh(self.middle(h)))

    def through(self, h):
        return h


net = Net()
"""
_LOOP = """
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
for step in range(24):
    optimizer.zero_grad()
    loss = F.mse_loss(net(x), y){more}
    loss.backward()
    optimizer.step()
"""


def through(body: str, before: str = "", more: str = "") -> str:
    """A net whose hidden value passes `body`, a function of `h`."""
    return _HEAD + before + f"\nnet.through = lambda h: {body}\n" + _LOOP.format(more=more)


def _trained(text: str) -> str:
    return _HEAD + text


_SQUARE = """
def square(x):
    return x * x

def no_gradient(inputs, out, grad):
    return torch.zeros_like(grad)

square = gradctl.custom_vjp(square, no_gradient)
"""
_GAN = """
D = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
G = nn.Linear(4, 8)
d_opt, g_opt = torch.optim.Adam(D.parameters()), torch.optim.Adam(G.parameters())
for step in range(24):
    fake = G(x)
    d_opt.zero_grad()
    d_loss = F.softplus(D({stopped})).mean() + F.softplus(-D(torch.randn(16, 8))).mean()
    d_loss.backward()
    d_opt.step()
    g_opt.zero_grad()
    with gradctl.freeze(D, nothing_left="allow"):
        F.softplus(-D(fake)).mean().backward()
    g_opt.step()
"""
_STEP = """
optimizer = torch.optim.{optimizer}(net.parameters(), lr=0.01)
step = gradctl.Step(net, optimizer, {options})
with step:
    for _ in range(12):
        step([(x[:8], y[:8]), (x[8:], y[8:])][:{batches}], lambda batch: F.mse_loss(net(batch[0]), batch[1]))
"""
_SCHEDULE = """
optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
schedule = gradctl.unfreeze_by_step({steps}, model=net, optimizer=optimizer)
for step in range(24):
    optimizer.zero_grad()
    F.mse_loss(net(x), y).backward()
    optimizer.step()
schedule.remove()
"""
_EMBED = """
table = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 1))
gradctl.freeze(table, rows={{"0.weight": {rows}}})
optimizer = torch.optim.Adam(table.parameters(), lr=0.01)
for step in range(24):
    optimizer.zero_grad()
    F.mse_loss(table(torch.arange({n})), torch.ones({n}, 1)).backward()
    optimizer.step()
"""

HEALTHY = {
    "stop": through("gradctl.stop(h)"),
    "stop_of_a_tuple": through("gradctl.stop((h, h))[0]"),
    "stop_in_a_helper": through("hold(h)", "def hold(h):\n    return gradctl.stop(h)\n"),
    "stop_of_a_target": through("h", more=" + F.mse_loss(net(x), gradctl.stop(net(x + 1)))"),
    "stop_of_a_term": through("h", more=" + gradctl.stop(net.encoder(x)).pow(2).mean()"),
    "stop_of_one_way": through("torch.cat([h[:, :4], gradctl.stop(h[:, 4:])], 1)"),
    "stop_twice": through("gradctl.stop(gradctl.stop(h) + 1)"),
    "stop_after_an_older_detach": through("gradctl.stop(h.detach())"),
    "scale_by_zero": through("gradctl.scale(h, 0)"),
    "scale_by_a_zero_tensor": through("gradctl.scale(h, torch.zeros(()))"),
    "scale_small": through("gradctl.scale(h, 1e-22)"),
    "reverse": through("gradctl.reverse(h)"),
    "reverse_by_nothing": through("gradctl.reverse(h, 0.0)"),
    "clip_norm": through("gradctl.clip(h, norm=1e-3)"),
    "clip_value": through("gradctl.clip(h, value=1e-3)"),
    "clip_tiny": through("gradctl.clip(h, norm=1e-25)"),
    "straight_through": through("gradctl.straight_through(torch.round, h)"),
    "straight_through_a_value": through("gradctl.straight_through(h.round(), h)"),
    "straight_through_sign": through("gradctl.straight_through(torch.sign, h, backward='clipped')"),
    "straight_through_all_outside": through(
        "gradctl.straight_through(torch.sign, h + 9, backward='clipped', bounds=(-1, 1))"
    ),
    "replace": through("gradctl.replace(net.middle(h), gradient_of=h)"),
    "replace_without_the_first": through("gradctl.replace(h, gradient_of=net.middle(x @ torch.ones(4, 8)))"),
    "replace_by_what_is_detached": through("gradctl.replace(net.middle(h).detach(), gradient_of=h)").replace(
        "torch.tanh(self.middle(h))", "torch.tanh(h)"
    ),
    "custom_vjp": through("square(h)", _SQUARE.replace("torch.zeros_like(grad)", "2 * inputs[0] * grad")),
    "custom_vjp_of_zeros": through("square(h)", _SQUARE),
    "freeze": _trained('gradctl.freeze(net, "encoder.*")\n' + _LOOP.format(more="")),
    "freeze_after_the_optimizer": _trained(
        _LOOP.format(more="").replace("for step", 'gradctl.freeze(net, "encoder.*")\nfor step')
    ),
    "freeze_in_the_middle": _trained(
        _LOOP.format(more="").replace(
            "    optimizer.zero_grad()",
            '    if step == 8:\n        gradctl.freeze(net, "encoder.*")\n    optimizer.zero_grad()',
        )
    ),
    "freeze_between_backward_and_step": _trained(
        _LOOP.format(more="").replace(
            "    optimizer.step()", '    with gradctl.freeze(net, "encoder.*"):\n        optimizer.step()'
        )
    ),
    "freeze_every_other_step": _trained(
        _LOOP.format(more="")
        .replace(
            "    optimizer.zero_grad()", '    frozen = gradctl.freeze(net, "encoder.*")\n    optimizer.zero_grad()'
        )
        .replace("    optimizer.step()", "    optimizer.step()\n    frozen.remove()")
    ),
    "unfreeze_for_a_while": _trained(
        'gradctl.freeze(net, "encoder.*")\n'
        + _LOOP.format(more="").replace(
            "for step",
            'opened = gradctl.unfreeze(net, "encoder.*", optimizer=optimizer)\nopened.remove()\nfor step',
        )
    ),
    "freeze_one_of_two": _GAN.join([_HEAD, ""]).format(stopped="gradctl.stop(fake)"),
    "freeze_rows": _trained(_EMBED.format(rows="range(3)", n=10)),
    "freeze_all_rows_that_are_used": _trained(_EMBED.format(rows="range(3)", n=3)),
    "unfreeze_by_step": _trained(_SCHEDULE.format(steps='{"head.*": 0, "middle.*": 6, "encoder.*": 12}')),
    "unfreeze_by_step_the_rest_frozen": _trained(_SCHEDULE.format(steps='{"head.*": 0, "middle.*": 6}')),
    "unfreeze_by_step_late": _trained(_SCHEDULE.format(steps='{"head.*": 0, "middle.*": 6, "encoder.*": 500}')),
    "recompute": _trained("recompute(net.middle)\n" + _LOOP.format(more="")),
    "recompute_a_function": through("again(h)", "again = recompute(lambda h: torch.sin(net.middle(h)))\n"),
    "recompute_with_a_stop_inside": through("again(h)", "again = recompute(lambda h: net.middle(gradctl.stop(h)))\n"),
    "step_plain": _trained(_STEP.format(optimizer="SGD", options="accumulate=2, items='rows'", batches=2)),
    "step_clip": _trained(_STEP.format(optimizer="SGD", options="accumulate=2, items='rows', clip=1e-2", batches=2)),
    "step_clip_value": _trained(
        _STEP.format(optimizer="SGD", options="accumulate=2, items='rows', clip=('value', 1e-3)", batches=2)
    ),
    "step_short": _trained(_STEP.format(optimizer="Adam", options="accumulate=4, items='rows'", batches=2)),
    "step_in_backward": _trained(
        _STEP.format(optimizer="SGD", options="update='in-backward', on_nonfinite='continue'", batches=1)
    ),
    **{
        f"precision_{mode.replace('-', '_')}": _trained(
            _STEP.format(
                optimizer="SGD",
                options=f"accumulate=2, items='rows', precision=gradctl.precision({mode!r}{more})",
                batches=2,
            )
        )
        for mode, more in (
            ("fp32", ""),
            ("bf16-autocast", ""),
            ("fp16-scaled", ", allow_slow=True"),
            ("bf16-master", ""),
            ("bf16-stochastic", ""),
            ("bf16-kahan", ""),
        )
    },
}
"""By name: each is healthy, whatever does not train in it."""

BUGS = {
    "a detach behind scale": ("detach", through("gradctl.scale(\n    h.detach(),  # cause\n    0.5)")),
    "a detach in front of clip": ("detach", through("gradctl.clip(h, norm=1.0)\\\n    .detach()  # cause")),
    "a detach beside a stop": (
        "detach",
        through("gradctl.stop(h) + h\\\n    .detach()  # cause"),
    ),
    "a round behind reverse": ("zero_grad_sign", through("gradctl.reverse(h\n    .round(),  # cause\n    0.5)")),
    "no_grad around a reversed value": (
        "no_grad",
        through(
            "held(h)",
            "def held(h):\n    with torch.no_grad():  # cause\n        return gradctl.reverse(h * 2)\n",
        ),
    ),
    "a detach inside a function that straight_through calls for its gradient": (
        "detach",
        through(
            "gradctl.straight_through(torch.round, h, backward=soft)",
            "def soft(h):\n    return torch.tanh(h.detach()) + net.middle.bias  # cause\n",
        ),
    ),
    "a detach inside of a recomputed function": (
        "detach",
        through("again(h)", "def cut(h):\n    return net.middle(h.detach())  # cause\nagain = recompute(cut)\n"),
    ),
    "a detach in the loss function of a Step": (
        "detach",
        _trained(
            "net.through = lambda h: h.detach()  # cause\n"
            + _STEP.format(optimizer="SGD", options="accumulate=2, items='rows', clip=1.0", batches=2)
        ),
    ),
    "a detach in a frozen network": (
        "detach",
        _trained(
            'gradctl.freeze(net, "head.*")\nnet.through = lambda h: h.detach()  # cause\n' + _LOOP.format(more="")
        ),
    ),
    "a parameter frozen by hand behind gradctl.unfreeze": (
        "frozen_params",
        _trained(
            'gradctl.freeze(net, "encoder.*")\ngradctl.unfreeze(net, "encoder.*")\n'
            + _LOOP.format(more="").replace(
                "for step", "for p in net.encoder.parameters():\n    p.requires_grad_(False)  # cause\nfor step"
            )
        ),
    ),
    "a parameter that unfreeze opens and no optimizer holds": (
        "param_not_in_optimizer",
        _trained(
            'gradctl.freeze(net, "encoder.*")\n'
            + _LOOP.format(more="")
            .replace("net.parameters()", "[p for p in net.parameters() if p.requires_grad]")
            .replace("for step", 'gradctl.unfreeze(net, "encoder.*")  # cause\nfor step')
        ),
    ),
}
"""By what is wrong: the cause, and a program with it on the line marked `# cause`."""

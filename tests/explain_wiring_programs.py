"""Programs whose parameters and optimizers do not fit together, the cause marked, and healthy look-alikes."""

HEAD = """\
import copy
import torch
from torch import nn
from torch.nn import functional as F

torch.manual_seed(0)


class Net(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        return self.head(torch.relu(self.body(x)))


def steps(model, optimizer, count=6):
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.randn(5, 6)).pow(2).mean().backward()
        optimizer.step()


"""

BROKEN = {
    "head_replaced_late": (
        "param_not_in_optimizer",
        """
def adapt(model):
    head = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    model.head = head  # cause
def main():
    model = Net()
    optimizer = torch.optim.Adam(model.parameters())
    steps(model, optimizer)
    adapt(model)
    steps(model, optimizer)
main()
""",
    ),
    "weights_loaded_by_assignment": (
        "param_not_in_optimizer",
        """
def restore(model, state):
    model.load_state_dict(state, assign=True)  # cause
def main():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps(model, optimizer, 2)
    restore(model, {k: v.clone() for k, v in model.state_dict().items()})
    steps(model, optimizer)
main()
""",
    ),
    "weight_assigned_anew": (
        "param_not_in_optimizer",
        """
def prune(layer, keep):
    layer.weight = nn.Parameter(layer.weight.detach() * keep)  # cause
def main():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps(model, optimizer, 2)
    prune(model.body, (torch.rand(8, 6) > 0.3).float())
    steps(model, optimizer)
main()
""",
    ),
    "deep_copy_trained": (
        "param_not_in_optimizer",
        """
def main():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps(model, optimizer, 3)
    model = copy.deepcopy(model)  # cause
    steps(model, optimizer)
main()
""",
    ),
    "another_class_built_again": (
        "param_not_in_optimizer",
        """
class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 32)
        self.last = nn.Linear(32, 3)
    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))
def main(wide):
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if wide:
        model = Wide()  # cause
    steps(model, optimizer)
main(True)
""",
    ),
    "layer_made_in_the_first_forward": (
        "param_not_in_optimizer",
        """
class Lazy(Net):
    def __init__(self):
        super().__init__()
        self.extra = None
    def forward(self, x):
        if self.extra is None:
            self.extra = nn.Linear(x.shape[1], x.shape[1])  # cause
        return super().forward(self.extra(x))
def main():
    model = Lazy()
    steps(model, torch.optim.SGD(model.parameters(), lr=0.1))
main()
""",
    ),
    "opened_after_a_filter": (
        "param_not_in_optimizer",
        """
def unfreeze(module):
    for parameter in module.parameters():
        parameter.requires_grad_(True)  # cause
def main():
    model = Net()
    model.body.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    steps(model, optimizer, 3)
    unfreeze(model.body)
    steps(model, optimizer)
main()
""",
    ),
    "experts_in_a_list": (
        "unregistered_module",
        """
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)
    def forward(self, x):
        return self.linear(x)
class Mixture(nn.Module):
    def __init__(self, count):
        super().__init__()
        self.experts = []  # cause
        for _ in range(count):
            self.experts.append(Block())
        self.head = nn.Linear(6, 1)
    def forward(self, x):
        return self.head(sum(expert(x) for expert in self.experts))
def main():
    model = Mixture(3)
    steps(model, torch.optim.SGD(model.parameters(), lr=0.1))
main()
""",
    ),
    "heads_in_a_dict_of_a_nested_module": (
        "unregistered_module",
        """
class Heads(nn.Module):
    def __init__(self, names):
        super().__init__()
        self.by_name = {name: nn.Linear(8, 2) for name in names}  # cause
    def forward(self, h):
        return sum(head(h) for head in self.by_name.values())
class Multi(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.heads = Heads(["a", "b"])
    def forward(self, x):
        return self.heads(torch.relu(self.body(x)))
def main():
    model = Multi()
    steps(model, torch.optim.SGD(model.parameters(), lr=0.1))
main()
""",
    ),
    "buffer_that_wants_a_gradient": (
        "not_a_parameter",
        """
class Scaled(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(3, requires_grad=True))  # cause
    def forward(self, x):
        return super().forward(x) * self.scale
def main():
    model = Scaled()
    steps(model, torch.optim.SGD(model.parameters(), lr=0.1))
main()
""",
    ),
    "parameter_in_an_expression": (
        "not_a_parameter",
        """
class Scaled(Net):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64)).to(torch.float32)  # cause
    def forward(self, x):
        return super().forward(x) + self.scale
def main():
    model = Scaled()
    steps(model, torch.optim.SGD(model.parameters(), lr=0.1))
main()
""",
    ),
    "train_closes_again": (
        "frozen_params",
        """
class Careful(Net):
    def __init__(self):
        super().__init__()
        self._freeze()
    def _freeze(self):
        for p in self.body.parameters():
            p.requires_grad_(False)
    def train(self, mode=True):
        super().train(mode)
        self._freeze()  # cause
        return self
def main():
    model = Careful()
    for stage in ("head", "all"):
        for name, p in model.named_parameters():
            p.requires_grad_(stage == "all" or name.startswith("head"))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for epoch in range(2):
            model.train()
            steps(model, optimizer, 3)
main()
""",
    ),
}

BROKEN["adapter_merged_for_a_preview"] = (
    "unused_param",
    """
class Adapted(nn.Module):
    def __init__(self):
        super().__init__()
        self.base = nn.Linear(6, 3).requires_grad_(False)
        self.down, self.up = nn.Linear(6, 2, bias=False), nn.Linear(2, 3, bias=False)
        self.merged = False
    def merge(self):
        self.base.weight.data += self.up.weight.data @ self.down.weight.data  # cause
        self.merged = True
    def forward(self, x):
        return self.base(x) if self.merged else self.base(x) + self.up(self.down(x))
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.adapted, self.head = Adapted(), nn.Linear(3, 2)
    def forward(self, x):
        return self.head(self.adapted(x))
def preview(model):
    with torch.no_grad():
        model.adapted.merge()
        return model(torch.randn(2, 6))
def main():
    model = Model()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    steps(model, optimizer, 5)
    preview(model)
    steps(model, optimizer, 6)
main()
""",
)

HEALTHY = {
    "stages_with_groups_added": """
def main():
    model = Net()
    model.body.requires_grad_(False)
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
    steps(model, optimizer, 3)
    model.body.requires_grad_(True)
    optimizer.add_param_group({"params": model.body.parameters()})
    steps(model, optimizer, 3)
    model.head = nn.Linear(8, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps(model, optimizer, 3)
main()
""",
    "features_of_an_open_network": """
class Perceptual(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Linear(3, 8), nn.ReLU())
    def forward(self, a, b):
        return (self.features(a) - self.features(b)).pow(2).mean()
def main():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = Perceptual()
    for _ in range(5):
        optimizer.zero_grad()
        loss(model(torch.randn(5, 6)), torch.randn(5, 3)).backward()
        optimizer.step()
main()
""",
    "head_only_on_an_open_body": """
def main():
    model = Net()
    steps(model, torch.optim.SGD(model.head.parameters(), lr=0.1))
main()
""",
    "two_players": """
def main():
    g, d = nn.Linear(4, 6), Net(1)
    og, od = torch.optim.Adam(g.parameters()), torch.optim.Adam(d.parameters())
    for _ in range(6):
        od.zero_grad()
        (d(g(torch.randn(5, 4)).detach()).mean() - d(torch.randn(5, 6)).mean()).backward()
        od.step()
        og.zero_grad()
        (-d(g(torch.randn(5, 4))).mean()).backward()
        og.step()
main()
""",
    "average_and_teacher": """
def main():
    model = Net()
    teacher = copy.deepcopy(model).requires_grad_(False)
    average = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(6):
        x = torch.randn(5, 6)
        optimizer.zero_grad()
        (model(x) - teacher(x)).pow(2).mean().backward()
        optimizer.step()
        with torch.no_grad():
            for a, p in zip(average.parameters(), model.parameters()):
                a.lerp_(p, 0.1)
main()
""",
    "points_of_an_equation": """
def main():
    class Points(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
            self.inside = torch.linspace(0, 1, 9)[:, None].requires_grad_(True)
        def forward(self):
            u = self.net(self.inside)
            slope, = torch.autograd.grad(u.sum(), self.inside, create_graph=True)
            return (slope - u).pow(2).mean()
    model = Points()
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(6):
        optimizer.zero_grad()
        model().backward()
        optimizer.step()
main()
""",
    "inner_loop_on_a_copy": """
def main():
    model = Net()
    outer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(5):
        fast = copy.deepcopy(model)
        inner = torch.optim.SGD(fast.parameters(), lr=0.1)
        steps(fast, inner, 2)
        fast.zero_grad()
        fast(torch.randn(5, 6)).pow(2).mean().backward()
        for p, q in zip(model.parameters(), fast.parameters()):
            p.grad = q.grad.clone()
        outer.step()
main()
""",
    "weights_updated_by_hand": """
def main():
    model, extra = Net(), nn.Parameter(torch.zeros(3))
    model.extra = None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps(model, optimizer, 2)
    model.extra = extra
    for _ in range(5):
        optimizer.zero_grad()
        (model(torch.randn(5, 6)) + model.extra).pow(2).mean().backward()
        optimizer.step()
        with torch.no_grad():
            extra -= 0.1 * extra.grad
        extra.grad = None
main()
""",
    "parts_trained_in_turn": """
def toggle(module, flag):
    for p in module.parameters():
        p.requires_grad_(flag)
def main():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for phase in range(5):
        toggle(model.body, phase % 2 == 0)
        toggle(model.head, phase % 2 == 1)
        steps(model, optimizer, 3)
main()
""",
    "opened_whole_then_frozen_in_part": """
def main():
    model = Net().requires_grad_(False)
    model.requires_grad_(True)
    model.body.requires_grad_(False)
    steps(model, torch.optim.SGD(model.parameters(), lr=0.1))
main()
""",
    "frozen_for_good_at_the_end": """
def main():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps(model, optimizer, 4)
    model.body.requires_grad_(False)
    steps(model, optimizer, 4)
main()
""",
    "teacher_hidden_in_a_list": """
class Distilled(Net):
    def __init__(self):
        super().__init__()
        self.teacher = [Net().eval()]
    def loss(self, x):
        return (self(x) - self.teacher[0](x)).pow(2).mean()
def main():
    model = Distilled()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        model.loss(torch.randn(5, 6)).backward()
        optimizer.step()
main()
""",
    "head_left_behind_and_target_copied": """
class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 2), nn.Linear(8, 2)
        self.use = "first"
    def forward(self, x):
        return getattr(self, self.use)(torch.relu(self.body(x)))
def main():
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps(model, optimizer, 5)
    model.use = "second"
    with torch.no_grad():
        model.second.weight.copy_(model.first.weight)
    steps(model, optimizer, 6)
main()
""",
}

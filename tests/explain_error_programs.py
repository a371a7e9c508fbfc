"""Programs that end with an error, the line of the cause marked, and look-alikes that end well."""

HEAD = """\
import copy
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

torch.manual_seed(0)


"""

BROKEN = {
    "shared_generator": (
        "graph_reused",
        """
G = nn.Linear(3, 4)
D = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
og = torch.optim.Adam(G.parameters())
od = torch.optim.Adam(D.parameters())
for i in range(4):
    fake = torch.tanh(G(torch.randn(5, 3)))
    d = D(fake).mean() - D(torch.randn(5, 4)).mean()
    od.zero_grad()
    d.backward()  # cause
    g = -D(fake).mean()
    og.zero_grad()
    g.backward()
    og.step()
""",
    ),
    "computed_in_init": (
        "graph_reused",
        """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Linear(4, 6)
        self.head = nn.Linear(6, 1)
        self.pos = torch.tanh(self.emb(torch.eye(4)))  # cause

    def forward(self, x):
        return self.head(x @ self.pos)


net = Net()
opt = torch.optim.SGD(net.parameters(), lr=0.1)
for e in range(2):
    for b in range(2):
        loss = net(torch.randn(3, 4)).pow(2).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
""",
    ),
    "dropped_repackage": (
        "detach_unused",
        """
class LM(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(4, 8)
        self.out = nn.Linear(8, 4)

    def forward(self, x, h):
        o, h = self.rnn(x, h)
        return self.out(o), h


def repackage(h):
    if isinstance(h, torch.Tensor):
        return h.detach()
    return tuple(repackage(v) for v in h)


net = LM()
opt = torch.optim.SGD(net.parameters(), lr=0.1)


def train(state):
    for step in range(3):
        y, state = net(torch.randn(5, 2, 4), state)
        loss = y.pow(2).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        repackage(state)  # cause


train((torch.zeros(1, 2, 8), torch.zeros(1, 2, 8)))
""",
    ),
    "rebound_loop_variable": (
        "detach_unused",
        """
class Dec:
    def __init__(self):
        self.hidden = [torch.zeros(2, 4), torch.zeros(2, 4)]

    def detach(self):
        for h in self.hidden:
            h = h.detach()  # cause


cells = nn.ModuleList([nn.GRUCell(4, 4), nn.GRUCell(4, 4)])
opt = torch.optim.SGD(cells.parameters(), lr=0.1)
st = Dec()
for step in range(3):
    x = torch.randn(2, 4)
    for i, c in enumerate(cells):
        x = c(x, st.hidden[i])
        st.hidden[i] = x
    loss = x.pow(2).mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
    st.detach()
""",
    ),
    "queue_of_live_tensors": (
        "stale_graph_carried",
        """
class Moco(nn.Module):
    def __init__(self):
        super().__init__()
        self.enc = nn.Linear(4, 6)
        self.queue = []

    def forward(self, x):
        z = F.normalize(self.enc(x), dim=-1)
        neg = torch.cat(self.queue) if self.queue else torch.zeros(1, 6)
        logits = z @ neg.t()
        self.queue.append(z)  # cause
        self.queue = self.queue[-4:]
        return logits.exp().mean()


net = Moco()
opt = torch.optim.SGD(net.parameters(), lr=0.1)
for i in range(4):
    loss = net(torch.randn(5, 4))
    opt.zero_grad()
    loss.backward()
    opt.step()
""",
    ),
    "bank_written_by_index": (
        "stale_graph_carried",
        """
class Bank:
    def __init__(self, n, d):
        self.data = torch.zeros(n, d)
        self.p = 0

    def put(self, z):
        n = len(z)
        self.data[self.p : self.p + n] = z  # cause
        self.p = (self.p + n) % len(self.data)


enc = nn.Linear(4, 6)
bank = Bank(20, 6)
opt = torch.optim.SGD(enc.parameters(), lr=0.1)
for i in range(4):
    z = enc(torch.randn(5, 4))
    bank.put(z)
    loss = (z @ bank.data.t()).exp().mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
""",
    ),
    "running_average": (
        "stale_graph_carried",
        """
net = nn.Linear(4, 1)
opt = torch.optim.SGD(net.parameters(), lr=0.1)
avg = torch.tensor(0.0)
for i in range(4):
    loss = net(torch.randn(5, 4)).pow(2).mean()
    avg = 0.9 * avg + 0.1 * loss  # cause
    total = loss + 0.1 * (loss - avg) ** 2
    opt.zero_grad()
    total.backward()
    opt.step()
""",
    ),
    "log_probs_not_cleared": (
        "stale_graph_carried",
        """
class Pi(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(4, 2)
        self.saved = []

    def act(self, o):
        d = torch.distributions.Categorical(logits=self.f(o))
        a = d.sample()
        self.saved.append(d.log_prob(a))
        return a


pi = Pi()
opt = torch.optim.SGD(pi.parameters(), lr=0.1)
for ep in range(3):
    for t in range(4):
        pi.act(torch.randn(4))
    loss = -(torch.stack(pi.saved) * torch.randn(len(pi.saved))).sum()  # cause
    opt.zero_grad()
    loss.backward()
    opt.step()
""",
    ),
    "retained_state": (
        "stale_graph_carried",
        """
class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.c = nn.GRUCell(4, 8)
        self.o = nn.Linear(8, 4)

    def forward(self, x, h):
        h = self.c(x, h)
        return self.o(h), h


net = Cell()
opt = torch.optim.Adam(net.parameters(), lr=0.1)
hx = torch.zeros(2, 8)
for i in range(3):
    x = torch.randn(2, 4)
    y, hx = net(x, hx)  # cause
    loss = (y - x).pow(2).mean()
    opt.zero_grad()
    loss.backward(retain_graph=True)
    opt.step()
""",
    ),
    "state_in_a_dict": (
        "stale_graph_carried",
        """
class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.c = nn.GRUCell(4, 8)
        self.o = nn.Linear(8, 4)

    def forward(self, x, state):
        h = self.c(x, state["h"])
        return self.o(h), {"h": h}


class Trainer:
    def __init__(self):
        self.net = Cell()
        self.opt = torch.optim.Adam(self.net.parameters(), lr=0.1)

    def step(self, x, state):
        y, new = self.net(x, state)
        loss = (y - x).pow(2).mean()
        self.opt.zero_grad()
        loss.backward()
        self.opt.step()
        return new

    def fit(self):
        state = {"h": torch.zeros(2, 8)}
        for i in range(3):
            state = self.step(torch.randn(2, 4), state)  # cause


Trainer().fit()
""",
    ),
    "weights_clipped_early": (
        "inplace_saved",
        """
D = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
od = torch.optim.Adam(D.parameters())


def clip(m, c):
    with torch.no_grad():
        for p in m.parameters():
            p.clamp_(-c, c)  # cause


for i in range(3):
    loss = D(torch.randn(5, 4)).mean()
    clip(D, 0.01)
    od.zero_grad()
    loss.backward()
    od.step()
""",
    ),
    "inplace_activation": (
        "inplace_saved",
        """
net = nn.Sequential(
    nn.Linear(4, 8),
    nn.Sigmoid(),
    nn.ReLU(inplace=True),  # cause
    nn.Linear(8, 1),
)
opt = torch.optim.SGD(net.parameters(), lr=0.1)
for i in range(2):
    loss = net(torch.randn(3, 4)).mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
""",
    ),
    "second_change_of_two": (
        "inplace_saved",
        """
class B(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.b = nn.Linear(8, 8)

    def forward(self, x):
        h = self.a(x)
        h += x
        g = torch.sigmoid(self.b(h))
        out = g * h
        g *= 0.5  # cause
        h2 = self.a(out)
        h2 += out
        return h2


net = B()
opt = torch.optim.SGD(net.parameters(), lr=0.1)
for i in range(3):
    loss = net(torch.randn(3, 8)).pow(2).mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
""",
    ),
    "two_optimizers": (
        "optimizer_step_inplace",
        """
trunk = nn.Linear(4, 8)
actor = nn.Linear(8, 2)
critic = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
oa = torch.optim.Adam([*trunk.parameters(), *actor.parameters()])
oc = torch.optim.Adam([*trunk.parameters(), *critic.parameters()])


def upd(opt, loss, keep=False):
    opt.zero_grad()
    loss.backward(retain_graph=keep)
    opt.step()  # cause


for i in range(3):
    z = torch.tanh(trunk(torch.randn(5, 4)))
    v = critic(z)
    p = actor(z).log_softmax(-1)
    lc = v.pow(2).mean()
    la = -(p[:, 0] * v.squeeze(-1)).mean()
    upd(oc, lc, True)
    upd(oa, la)
""",
    ),
    "scaled_vector_loss": (
        "non_scalar_loss",
        """
class Loss(nn.Module):
    def __init__(self):
        super().__init__()
        self.ce = nn.CrossEntropyLoss(reduction="none")

    def forward(self, x, y):
        return self.ce(x, y) * 0.5  # cause


net = nn.Linear(4, 3)
crit = Loss()
opt = torch.optim.SGD(net.parameters(), lr=0.1)
for i in range(3):
    loss = crit(net(torch.randn(5, 4)), torch.zeros(5, dtype=torch.long))
    loss = loss / 4
    loss.backward()
    opt.step()
""",
    ),
    "meter": (
        "numpy_on_grad",
        """
import numpy as np


class Meter:
    def __init__(self):
        self.vals = {}

    def update(self, k, v):
        self.vals.setdefault(k, []).append(v)  # cause

    def mean(self, k):
        return np.mean([np.asarray(v) for v in self.vals[k]])


net = nn.Linear(4, 1)
opt = torch.optim.SGD(net.parameters(), lr=0.1)
m = Meter()
for i in range(3):
    loss = net(torch.randn(5, 4)).mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
    m.update("loss", loss)
print(m.mean("loss"))
""",
    ),
    "plain_conversion": (
        "numpy_on_grad",
        """
net = nn.Linear(4, 1)


def to_np(t):
    return t.cpu().numpy()  # cause


y = net(torch.randn(5, 4))
print(to_np(y))
""",
    ),
    "cached_activation": (
        "deepcopy_nonleaf",
        """
import copy


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.cache = None

    def forward(self, x):
        h = self.a(x)
        h = torch.relu(h)
        y = h.sum()
        self.cache = h  # cause
        return y


class Wrap(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Net()

    def forward(self, x):
        return self.inner(x)


net = Wrap()
opt = torch.optim.SGD(net.parameters(), lr=0.1)
for i in range(3):
    loss = net(torch.randn(5, 4))
    opt.zero_grad()
    loss.backward()
    opt.step()
    best = copy.deepcopy(net)
""",
    ),
    "loss_returns_item": (
        "loss_not_tensor",
        """
def charbonnier(a, b):
    v = torch.sqrt((a - b) ** 2 + 1e-6)
    return v.mean().item()  # cause


net = nn.Linear(4, 4)
opt = torch.optim.SGD(net.parameters(), lr=0.1)
log = []
for i in range(3):
    x = torch.randn(5, 4)
    out = net(x)
    log.append(out.mean().item())
    loss = 0.5 * charbonnier(out, x)
    opt.zero_grad()
    loss.backward()
""",
    ),
    "sum_of_nothing": (
        "loss_not_tensor",
        """
net = nn.Linear(4, 4)
opt = torch.optim.SGD(net.parameters(), lr=0.1)


class Crit:
    def __call__(self, out, masks):
        total = 0  # cause
        for m in masks:
            if m.any():
                total = total + out[m].mean()
        return total


crit = Crit()
for n in (2, 1, 0):
    out = net(torch.randn(5, 4))
    loss = crit(out, [torch.ones(5, dtype=torch.bool)] * n)
    opt.zero_grad()
    loss.backward()
    opt.step()
""",
    ),
    "numpy_mean": (
        "loss_not_tensor",
        """
import numpy as np

net = nn.Linear(4, 4)


def loss_fn(outs):
    vals = []
    for o in outs:
        vals.append(o.pow(2).mean().item())  # cause
    return np.mean(vals)


for i in range(2):
    outs = [net(torch.randn(5, 4)) for _ in range(3)]
    loss = loss_fn(outs)
    loss.backward()
""",
    ),
    "optimised_code": (
        "non_leaf_param",
        """
class Enc(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 6)
        self.b = nn.Linear(6, 3)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


enc = Enc()
dec = nn.Linear(3, 4)


def invert(x):
    z = enc(x)  # cause
    opt = torch.optim.Adam([z], lr=0.1)
    return opt


invert(torch.randn(2, 4))
""",
    ),
    "normalised_parameter": (
        "param_rebound",
        """
w = torch.randn(4, requires_grad=True)
for i in range(3):
    loss = (w * torch.randn(4)).sum()
    loss.backward()
    with torch.no_grad():
        w -= 0.1 * w.grad
        w.grad.zero_()
    w = F.normalize(w, dim=0)  # cause
""",
    ),
    "inference_decorator": (
        "inference_mode",
        """
class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(4, 6)
        self.h = nn.Linear(6, 2)

    @torch.inference_mode()  # cause
    def encode(self, x):
        return torch.tanh(self.f(x))


net = Policy()
opt = torch.optim.SGD(net.parameters(), lr=0.1)
buf = []
for i in range(3):
    buf.append(net.encode(torch.randn(3, 4)))
    loss = net.h(buf[-1]).mean()
    opt.zero_grad()
    loss.backward()
""",
    ),
    "column_of_the_input": (
        "input_not_in_graph",
        """
net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
for i in range(2):
    x = torch.rand(5, 3, requires_grad=True)
    t = x[:, :1]  # cause
    u = net(x).sum()
    (du,) = torch.autograd.grad(u, t)
""",
    ),
    "used_up_generator": (
        "empty_optimizer",
        """
net = nn.Linear(4, 1)
params = net.parameters()  # cause
print(sum(p.numel() for p in params))
opt = torch.optim.SGD(params, lr=0.1)
""",
    ),
    "all_frozen": (
        "empty_optimizer",
        """
net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))


def freeze(m):
    for p in m.parameters():
        p.requires_grad = False  # cause


freeze(net)
opt = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
""",
    ),
    "dict_entry_not_read": (
        "unused_output",
        """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.t = nn.Linear(4, 6)
        self.a = nn.Linear(6, 1)
        self.b = nn.Linear(6, 1)

    def forward(self, x):
        h = torch.tanh(self.t(x))
        return {"main": self.a(h), "aux": self.b(h)}


net = Net()
opt = torch.optim.SGD(net.parameters(), lr=0.1)
for i in range(3):
    out = net(torch.randn(3, 4))
    loss = out["main"].pow(2).mean()  # cause
    opt.zero_grad()
    loss.backward()
    opt.step()
""",
    ),
    "gradient_of_wrong_shape": (
        "custom_function_wrong_count",
        """
class Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, b):
        return x + b

    @staticmethod
    def backward(ctx, g):
        return g, g[:, :2]  # cause


b = nn.Parameter(torch.zeros(4))
net = nn.Linear(3, 4)
opt = torch.optim.SGD([b, *net.parameters()], lr=0.1)
for i in range(2):
    loss = Add.apply(net(torch.randn(5, 3)), b).pow(2).mean()
    opt.zero_grad()
    loss.backward()
""",
    ),
    "loss_outside_of_closure": (
        "graph_reused",
        """
w = torch.randn(4, requires_grad=True)
A = torch.randn(8, 4)
b = torch.randn(8)
opt = torch.optim.LBFGS([w])
loss = (A @ w - b).pow(2).sum()  # cause


def closure():
    opt.zero_grad()
    loss.backward()
    return loss


for i in range(2):
    opt.step(closure)
""",
    ),
    "anchors_of_the_epoch": (
        "graph_reused",
        """
enc = nn.Sequential(nn.Linear(4, 8), nn.Tanh())
head = nn.Linear(8, 1)
opt = torch.optim.SGD([*enc.parameters(), *head.parameters()], lr=0.1)
proto = torch.randn(3, 4)
for e in range(2):
    anchors = enc(proto)  # cause
    for b in range(3):
        z = enc(torch.randn(5, 4))
        loss = (z @ anchors.t()).exp().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
""",
    ),
    "buffer_with_history": (
        "stale_graph_carried",
        """
class Norm(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.register_buffer("mean", torch.zeros(d))
        self.w = nn.Parameter(torch.ones(d))

    def forward(self, x):
        m = x.mean(0)
        self.mean = 0.9 * self.mean + 0.1 * m  # cause
        return (x - self.mean) * self.w


net = nn.Sequential(nn.Linear(4, 6), Norm(6), nn.Linear(6, 1))
opt = torch.optim.SGD(net.parameters(), lr=0.1)
for i in range(3):
    loss = net(torch.randn(5, 4)).pow(2).mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
""",
    ),
    "total_of_losses": (
        "stale_graph_carried",
        """
net = nn.Linear(4, 1)
opt = torch.optim.SGD(net.parameters(), lr=0.1)
total = 0.0
for i in range(4):
    loss = net(torch.randn(5, 4)).pow(2).mean()
    total += loss  # cause
    opt.zero_grad()
    total.backward()
    opt.step()
""",
    ),
    "masked_after_softmax": (
        "inplace_saved",
        """
class Attn(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(4, 4)
        self.k = nn.Linear(4, 4)

    def forward(self, x):
        a = (self.q(x) @ self.k(x).transpose(-1, -2)).softmax(-1)
        m = torch.rand_like(a) < 0.3
        a.masked_fill_(m, 0.0)  # cause
        return a @ x


net = Attn()
opt = torch.optim.SGD(net.parameters(), lr=0.1)
for i in range(2):
    loss = net(torch.randn(2, 5, 4)).pow(2).mean()
    opt.zero_grad()
    loss.backward()
""",
    ),
    "changed_through_a_view": (
        "inplace_saved",
        """
net = nn.Linear(4, 8)
opt = torch.optim.SGD(net.parameters(), lr=0.1)


def gate(h):
    a = h[:, :4]
    b = h[:, 4:]
    b *= 0.1  # cause
    return a, b


for i in range(2):
    h = net(torch.randn(3, 4)).tanh()
    y = h.exp()
    a, b = gate(h)
    loss = y.sum() + (a * b).sum()
    opt.zero_grad()
    loss.backward()
""",
    ),
    "gradient_of_a_result": (
        "non_leaf_grad",
        """
x = torch.rand(3, requires_grad=True)
y = x.double()  # cause
(y * 2).sum().backward()
print(y.grad.abs())
""",
    ),
    "underscore": (
        "unused_output",
        """
class Enc(nn.Module):
    def __init__(self):
        super().__init__()
        self.t = nn.Linear(4, 6)
        self.mu = nn.Linear(6, 2)
        self.lv = nn.Linear(6, 2)

    def forward(self, x):
        h = torch.tanh(self.t(x))
        mu = self.mu(h)
        lv = self.lv(h)
        return mu, lv


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.e = Enc()
        self.d = nn.Linear(2, 4)

    def forward(self, x):
        mu, _ = self.e(x)  # cause
        return self.d(mu)


net = VAE()
opt = torch.optim.SGD(net.parameters(), lr=0.1)
for i in range(3):
    x = torch.randn(3, 4)
    loss = (net(x) - x).pow(2).mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
""",
    ),
    "number_through_a_dict": (
        "item",
        """
def style(a, b):
    g = a.t() @ a - b.t() @ b
    v = g.pow(2).mean()
    return v.item()  # cause


class T:
    def __init__(self):
        self.net = nn.Linear(4, 4)
        self.head = nn.Linear(4, 4)
        self.opt = torch.optim.SGD([*self.net.parameters(), *self.head.parameters()], lr=0.1)
        self.w = 0.1
        self.hist = []

    def losses(self, x):
        y = self.net(x)
        z = self.head(x)
        self.hist.append(y.mean().item())
        out = {"rec": (y - x).pow(2).mean()}
        out["style"] = style(z, x)
        print("max", z.max().item())
        return out

    def fit(self):
        for i in range(3):
            d = self.losses(torch.randn(5, 4))
            loss = d["rec"] + self.w * d["style"]
            self.opt.zero_grad()
            loss.backward()
            self.opt.step()


T().fit()
""",
    ),
    "float_start": (
        "loss_not_tensor",
        """
class Crit(nn.Module):
    def forward(self, p, t):
        n = 0
        loss = 0.0  # cause
        for a, b in zip(p, t):
            if b >= 0:
                loss = loss + (a - b) ** 2
                n += 1
        return loss / max(n, 1)


net = nn.Linear(4, 1)
crit = Crit()
for t in (torch.ones(3), -torch.ones(3)):
    loss = crit(net(torch.randn(3, 4))[:, 0], t)
    loss.backward()
""",
    ),
}

HEALTHY = {
    "truncated": """
net = nn.GRU(4, 8)
o = nn.Linear(8, 4)
opt = torch.optim.SGD([*net.parameters(), *o.parameters()], lr=0.1)
h = torch.zeros(1, 2, 8)
for i in range(3):
    y, h = net(torch.randn(5, 2, 4), h)
    loss = o(y).pow(2).mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
    h = h.detach()
""",
    "caught_errors": """
net = nn.Linear(4, 1)
opt = torch.optim.SGD(net.parameters(), lr=0.1)
for i in range(3):
    loss = net(torch.randn(5, 4)).pow(2).mean()
    opt.zero_grad()
    loss.backward()
    try:
        loss.backward()
    except RuntimeError:
        pass
    try:
        loss.numpy()
    except RuntimeError:
        pass
    opt.step()
""",
    "two_losses_with_retain_graph": """
trunk = nn.Linear(4, 8)
a = nn.Linear(8, 1)
b = nn.Linear(8, 1)
opt = torch.optim.SGD([*trunk.parameters(), *a.parameters(), *b.parameters()], lr=0.1)
for i in range(3):
    z = torch.tanh(trunk(torch.randn(5, 4)))
    opt.zero_grad()
    a(z).pow(2).mean().backward(retain_graph=True)
    b(z).pow(2).mean().backward()
    opt.step()
""",
    "detached_fake": """
G = nn.Linear(3, 4)
D = nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 1))
og = torch.optim.Adam(G.parameters())
od = torch.optim.Adam(D.parameters())
for i in range(4):
    fake = torch.tanh(G(torch.randn(5, 3)))
    d = D(fake.detach()).mean() - D(torch.randn(5, 4)).mean()
    od.zero_grad()
    d.backward()
    od.step()
    g = -D(fake).mean()
    og.zero_grad()
    g.backward()
    og.step()
""",
    "changed_where_nothing_is_saved": """
class B(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.b = nn.Linear(6, 6)

    def forward(self, x):
        h = self.a(x)
        h += x
        rows = []
        for row in self.b(torch.relu(h)).unbind(0):
            rows.append(row * 2)
        out = torch.stack(rows)
        out[:, 0] = 0.0
        return out


net = B()
opt = torch.optim.SGD(net.parameters(), lr=0.1)
for i in range(3):
    loss = net(torch.randn(5, 6)).pow(2).mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
    with torch.no_grad():
        for p in net.parameters():
            p.clamp_(-1, 1)
""",
    "kept_without_history": """
net = nn.Linear(4, 4)
opt = torch.optim.SGD(net.parameters(), lr=0.1)
curve = []
bank = torch.zeros(8, 4)
for i in range(4):
    out = net(torch.randn(4, 4))
    loss = (out @ bank.t()).exp().mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
    bank[4 * (i % 2) : 4 * (i % 2) + 4] = out.detach()
    curve.append(loss.detach())
    best = copy.deepcopy(net)
print(np.mean([np.asarray(v) for v in curve]))
""",
    "cloned_out_of_inference": """
pi = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
opt = torch.optim.SGD(pi.parameters(), lr=0.1)
for i in range(3):
    with torch.inference_mode():
        obs = torch.randn(6, 4)
        act = pi(obs).argmax(-1)
    obs, act = obs.clone(), act.clone()
    loss = F.cross_entropy(pi(obs), act)
    opt.zero_grad()
    loss.backward()
    opt.step()
""",
    "unused_is_allowed": """
net = nn.Linear(3, 1)
opt = torch.optim.SGD(net.parameters(), lr=0.1)
for i in range(3):
    x = torch.rand(5, 3, requires_grad=True)
    t = torch.rand(5, 1, requires_grad=True)
    u = net(x).tanh()
    du, dt = torch.autograd.grad(u.sum(), (x, t), create_graph=True, allow_unused=True)
    loss = u.pow(2).mean() + du.pow(2).mean()
    opt.zero_grad()
    loss.backward()
    opt.step()
""",
    "connected_zero": """
net = nn.Linear(4, 4)
opt = torch.optim.SGD(net.parameters(), lr=0.1)


def box_loss(p, b):
    if len(b) == 0:
        return p.sum() * 0.0
    return (p[: len(b)] - b).abs().mean()


for n in (2, 0, 3, 0):
    loss = box_loss(net(torch.randn(5, 4)), torch.rand(n, 4))
    opt.zero_grad()
    loss.backward()
    opt.step()
""",
}

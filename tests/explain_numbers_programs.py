"""Programs whose numbers go wrong, the line of the cause marked, and look-alikes that mean what they do."""

HEAD = """\
import copy
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

torch.manual_seed(0)


def main(make, loss_of, steps=6, lr=0.05):
    m = make()
    o = torch.optim.SGD(m.parameters(), lr=lr)
    for step in range(steps):
        loss = loss_of(m, step)
        o.zero_grad()
        loss.backward()
        o.step()


"""

BROKEN = {
    "buffer_of_zeros": (
        "zero_grad_factor",
        """
class M(nn.Module):
    def __init__(s):
        super().__init__()
        s.f=nn.Linear(6,6)
        s.h=nn.Linear(6,1)
        s.register_buffer("mask", torch.zeros(6))
    def forward(s,x): return s.h(x+s.mask*s.f(x)) # cause
main(M, lambda m,i: m(torch.randn(4,6)).pow(2).mean())
""",
    ),
    "mask_that_selects_nothing": (
        "zero_grad_factor",
        """
class M(nn.Module):
    def __init__(s):
        super().__init__()
        s.f=nn.Linear(6,6)
        s.h=nn.Linear(6,1)
    def forward(s,x):
        mask = (x > 100).float()
        return s.h(x+s.f(x)*mask) # cause
main(M, lambda m,i: m(torch.randn(4,6)).pow(2).mean())
""",
    ),
    "softmax_of_a_masked_row": (
        "nan_softmax_masked",
        """
class M(nn.Module):
    def __init__(s):
        super().__init__()
        s.q=nn.Linear(6,6)
        s.h=nn.Linear(6,1)
    def forward(s,x,bad):
        q=s.q(x); a=q@q.transpose(-1,-2); m=torch.triu(torch.full((4,4),float("-inf")),1)
        if bad: m[:]=float("-inf")
        p=(a+m).softmax(-1) # cause
        return s.h(p@q)
main(M, lambda m,i: m(torch.randn(2,4,6),i==3).pow(2).mean())
""",
    ),
    "normalize_over_one": (
        "zero_grad_size_one",
        """
class M(nn.Module):
    def __init__(s):
        super().__init__()
        s.f=nn.Linear(6,1)
        s.h=nn.Linear(1,1)
    def forward(s,x):
        z = F.normalize(s.f(x), dim=-1) # cause
        return s.h(z)
main(M, lambda m,i: m(torch.randn(4,6)).pow(2).mean())
""",
    ),
    "layer_norm_over_one": (
        "zero_grad_size_one",
        """
class M(nn.Module):
    def __init__(s):
        super().__init__()
        s.f=nn.Linear(6,1)
        s.n=nn.LayerNorm(1)
        s.h=nn.Linear(1,1)
    def forward(s,x):
        return s.h(s.n(s.f(x))) # cause
main(M, lambda m,i: m(torch.randn(4,6)).pow(2).mean())
""",
    ),
    "mean_over_one_is_taken_off": (
        "zero_grad_size_one",
        """
class M(nn.Module):
    def __init__(s):
        super().__init__()
        s.f=nn.Linear(6,1)
        s.h=nn.Linear(1,1)
    def forward(s,x):
        z=s.f(x)
        mu=z.mean(-1,keepdim=True)
        return s.h(z-mu) # cause
main(M, lambda m,i: (m(torch.randn(4,6))-1).pow(2).mean())
""",
    ),
    "softmax_by_hand_over_one": (
        "zero_grad_size_one",
        """
class M(nn.Module):
    def __init__(s):
        super().__init__()
        s.f=nn.Linear(6,1)
        s.h=nn.Linear(1,1)
    def forward(s,x):
        z=s.f(x)
        e=z-z.amax(-1,keepdim=True) # cause
        return s.h(e.exp())
main(M, lambda m,i: (m(torch.randn(4,6))-1).pow(2).mean())
""",
    ),
    "cross_entropy_of_one_class": (
        "zero_grad_size_one",
        """
class M(nn.Module):
    def __init__(s):
        super().__init__()
        s.f=nn.Linear(6,1)
    def forward(s,x):
        return F.cross_entropy(s.f(x), torch.zeros(4,dtype=torch.long)) # cause
main(M, lambda m,i: m(torch.randn(4,6)))
""",
    ),
    "clamp_that_saturates_later": (
        "zero_grad_clamp",
        """
class M(nn.Module):
    def __init__(s):
        super().__init__()
        s.f=nn.Linear(6,6)
    def forward(s,x,k):
        y=s.f(x)*k
        y=torch.clamp(y,-1,1) if k==1 else torch.clamp(y+1000,-1,1) # cause
        return (y-0.3).pow(2).mean()
main(M, lambda m,i: m(torch.randn(4,6), 1 if i<6 else 2), steps=12)
""",
    ),
    "hook_that_returns_zero": (
        "grad_overwritten",
        """
class M(nn.Module):
    def __init__(s):
        super().__init__()
        s.f=nn.Linear(6,6)
        s.h=nn.Linear(6,1)
    def forward(s,x):
        y=s.f(x)
        y.register_hook(lambda g: g*0) # cause
        return s.h(y)
main(M, lambda m,i: m(torch.randn(4,6)).pow(2).mean())
""",
    ),
    "log_of_zero": (
        "nan_log",
        """
class M(nn.Module):
    def __init__(s):
        super().__init__()
        s.f=nn.Linear(6,6)
    def forward(s,x):
        p=s.f(x).softmax(-1)
        return -(p*p.log()).sum(-1).mean() # cause
main(M, lambda m,i: m(torch.randn(4,6)*(1 if i<3 else 1e4)))
""",
    ),
    "power_of_one_half_at_zero": (
        "nan_sqrt",
        """
class M(nn.Module):
    def __init__(s):
        super().__init__()
        s.f=nn.Linear(6,6)
    def forward(s,x,k):
        y=s.f(x)
        d=((y-(y.detach() if k else 0))**2).sum(-1)
        return (d**0.5).mean() # cause
main(M, lambda m,i: m(torch.randn(4,6), i==3))
""",
    ),
    "adam_without_eps": (
        "nonfinite",
        """
m=nn.Linear(4,2)
o=torch.optim.Adam(m.parameters(),lr=0.1,eps=0.0)
for i in range(6):
    x=torch.randn(8,4); x[:,0]=0
    loss=m(x).pow(2).mean()
    o.zero_grad()
    loss.backward()
    o.step() # cause
""",
    ),
    "learning_rate_far_too_large": (
        "nan_overflow",
        """
m=nn.Linear(4,2)
o=torch.optim.SGD(m.parameters(),lr=1e8)
for i in range(30):
    y=m(torch.randn(8,4))
    loss=y.pow(2).mean() # cause
    o.zero_grad()
    loss.backward()
    o.step()
""",
    ),
    "nan_in_the_data": (
        "nonfinite",
        """
m=nn.Linear(4,2)
o=torch.optim.SGD(m.parameters(),lr=1e-2)
for i in range(9):
    x=torch.randn(8,4)
    if i==5: x[1,1]=float("nan")
    y=m(x) # cause
    loss=y.pow(2).mean()
    o.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(m.parameters(),1.0)
    o.step()
""",
    ),
    "mean_of_nothing": (
        "nonfinite",
        """
m=nn.Linear(4,2)
o=torch.optim.SGD(m.parameters(),lr=1e-2)
for i in range(9):
    x=torch.randn(8,4); keep=torch.rand(8)>(0.3 if i<5 else 2)
    y=m(x)
    loss=y[keep].pow(2).mean() # cause
    o.zero_grad()
    loss.backward()
    o.step()
""",
    ),
    "saturated_tanh": (
        "vanished_grad",
        """
class M(nn.Module):
    def __init__(s):
        super().__init__()
        s.f=nn.Linear(6,6)
        s.h=nn.Linear(6,1)
    def forward(s,x):
        y=torch.tanh(s.f(x)*1e6) # cause
        return s.h(y)
main(M, lambda m,i: m(torch.rand(4,6)).pow(2).mean())
""",
    ),
    "deep_stack_of_sigmoids": (
        "vanished_grad",
        """
class M(nn.Module):
    def __init__(s):
        super().__init__()
        s.f=nn.ModuleList(nn.Linear(6,6) for _ in range(40))
        s.h=nn.Linear(6,1)
    def forward(s,x):
        for f in s.f:
            x=torch.sigmoid(f(x)) # cause
        return s.h(x)
main(M, lambda m,i: m(torch.rand(4,6)).pow(2).mean())
""",
    ),
    "two_factors_of_zeros": (
        "zero_grad_factor",
        """
class M(nn.Module):
    def __init__(s):
        super().__init__()
        s.f=nn.Linear(6,6)
        s.h=nn.Linear(6,1,bias=False)
        nn.init.zeros_(s.f.weight); nn.init.zeros_(s.f.bias)
        nn.init.zeros_(s.h.weight) # cause
    def forward(s,x): return s.h(torch.tanh(s.f(x)))
main(M, lambda m,i: (m(torch.rand(4,6))-1).pow(2).mean())
""",
    ),
    "cast_to_half": (
        "nan_overflow",
        """
class M(nn.Module):
    def __init__(s):
        super().__init__()
        s.f=nn.Linear(6,6)
    def forward(s,x):
        y=(s.f(x)*1e5).to(torch.float16) # cause
        return (y.float()-1).pow(2).mean()
main(M, lambda m,i: m(torch.rand(4,6)+i*5), lr=1e-12)
""",
    ),
    "nan_in_the_first_of_two_microbatches": (
        "nan_sqrt",
        """
m=nn.Linear(4,2)
o=torch.optim.SGD(m.parameters(),lr=1e-2)
for i in range(8):
    for j in range(2):
        x=torch.randn(8,4); y=m(x)
        if i==4 and j==0: y=y*0
        d=y.pow(2).sum(-1).sqrt() # cause
        d.mean().backward()
    o.step(); o.zero_grad()
""",
    ),
    "assignment_to_data": (
        "data_inplace_saved",
        """
m=nn.Linear(4,2)
w=nn.Parameter(torch.ones(2))
o=torch.optim.SGD([*m.parameters(),w],lr=1e-2)
for i in range(8):
    loss=(torch.tanh(m(torch.randn(8,4)))*w).pow(2).mean()
    w.data = w.data.clamp(-0.1, 0.1) # cause
    o.zero_grad()
    loss.backward()
    o.step()
""",
    ),
    "edit_of_a_view_of_data": (
        "data_inplace_saved",
        """
m=nn.Linear(4,2)
o=torch.optim.SGD(m.parameters(),lr=1e-2)
for i in range(8):
    y=torch.sigmoid(m(torch.randn(8,4))); s=y.sum()
    y.data[0].mul_(0.5) # cause
    o.zero_grad()
    s.backward()
    o.step()
""",
    ),
    "function_that_returns_zeros": (
        "custom_function_none",
        """
class R(torch.autograd.Function):
    @staticmethod
    def forward(ctx,x): return x.round()
    @staticmethod
    def backward(ctx,g):
        return torch.zeros_like(g) # cause
class M(nn.Module):
    def __init__(s):
        super().__init__()
        s.f=nn.Linear(6,6)
        s.h=nn.Linear(6,1)
    def forward(s,x): return s.h(R.apply(s.f(x)))
main(M, lambda m,i: m(torch.rand(4,6)).pow(2).mean())
""",
    ),
    "where_that_never_selects": (
        "zero_grad_factor",
        """
class M(nn.Module):
    def __init__(s):
        super().__init__()
        s.f=nn.Linear(6,6)
        s.h=nn.Linear(6,1)
    def forward(s,x):
        y=torch.where(x>50, s.f(x), x) # cause
        return s.h(y)
main(M, lambda m,i: m(torch.rand(3,6)).pow(2).mean())
""",
    ),
}

HEALTHY = {
    "lora_whose_second_factor_starts_at_zero": """
class M(nn.Module):
    def __init__(s):
        super().__init__()
        s.base=nn.Linear(6,6)
        s.base.requires_grad_(False)
        s.a=nn.Linear(6,2,bias=False)
        s.b=nn.Linear(2,6,bias=False)
        nn.init.zeros_(s.b.weight)
    def forward(s,x): return s.base(x)+s.b(s.a(x))
main(M, lambda m,i: m(torch.randn(4,6)).pow(2).mean())
""",
    "lora_in_its_only_step": """
class M(nn.Module):
    def __init__(s):
        super().__init__()
        s.base=nn.Linear(6,6)
        s.base.requires_grad_(False)
        s.a=nn.Linear(6,2,bias=False)
        s.b=nn.Linear(2,6,bias=False)
        nn.init.zeros_(s.b.weight)
    def forward(s,x): return s.base(x)+s.b(s.a(x))
main(M, lambda m,i: m(torch.randn(4,6)).pow(2).mean(), steps=1)
""",
    "rezero_gate_that_starts_at_zero": """
class M(nn.Module):
    def __init__(s):
        super().__init__()
        s.f=nn.Linear(6,6)
        s.g=nn.Parameter(torch.zeros(1))
        s.h=nn.Linear(6,1)
    def forward(s,x): return s.h(x+s.g*torch.relu(s.f(x)))
main(M, lambda m,i: m(torch.randn(4,6)).pow(2).mean(), steps=2)
""",
    "term_with_the_number_zero_for_weight": """
class M(nn.Module):
    def __init__(s):
        super().__init__()
        s.f=nn.Linear(6,6)
        s.h=nn.Linear(6,1)
    def forward(s,x): return s.h(x).pow(2).mean() + 0.0*s.f(x).mean()
main(M, lambda m,i: m(torch.randn(4,6)))
""",
    "hinge_that_is_never_active": """
class M(nn.Module):
    def __init__(s):
        super().__init__()
        s.f=nn.Linear(6,6)
        s.h=nn.Linear(6,1)
    def forward(s,x):
        z=s.f(x)
        return s.h(x).pow(2).mean() + torch.relu(0.2 + (z[0]-z[1]).norm() - 100*(z[0]-z[2]).norm())
main(M, lambda m,i: m(torch.randn(4,6)))
""",
    "loss_scaler_that_begins_too_high": """
m=nn.Linear(4,1)
o=torch.optim.SGD(m.parameters(),lr=0.1)
sc=torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=100)
for i in range(40):
    loss=(m(torch.randn(8,4))).pow(2).mean()
    o.zero_grad()
    sc.scale(loss).backward()
    sc.step(o)
    sc.update()
""",
    "program_that_skips_a_broken_step": """
m=nn.Linear(4,1)
o=torch.optim.SGD(m.parameters(),lr=0.1)
for i in range(10):
    x=torch.randn(8,4)
    if i==4: x[0,0]=float("nan")
    loss=m(x).pow(2).mean()
    o.zero_grad()
    loss.backward()
    if not torch.isfinite(m.weight.grad).all(): continue
    o.step()
""",
    "program_that_skips_now_and_then": """
m=nn.Linear(4,1)
o=torch.optim.SGD(m.parameters(),lr=0.1)
for i in range(40):
    y=m(torch.randn(8,4))
    if i in (0,1,2,11,20,21,38,39): y=y*0
    loss=y.pow(2).sum(-1).sqrt().mean()
    o.zero_grad()
    loss.backward()
    if torch.isfinite(m.weight.grad).all(): o.step()
""",
    "loss_scaler_in_a_short_program": """
m=nn.Linear(4,1)
o=torch.optim.SGD(m.parameters(),lr=0.1)
sc=torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=100)
for i in range(4):
    loss=(m(torch.randn(8,4))*100).pow(2).mean()
    o.zero_grad()
    sc.scale(loss).backward()
    sc.step(o)
    sc.update()
""",
    "loss_that_was_broken_in_a_stage_of_its_own": """
m=nn.Linear(4,1)
o=torch.optim.SGD(m.parameters(),lr=0.1)
for i in range(30):
    if i<10:
        loss=(m(torch.randn(8,4))*(i<6)).pow(2).sum(-1).sqrt().mean()
    else:
        loss=m(torch.randn(8,4)).pow(2).mean()
    o.zero_grad()
    loss.backward()
    if torch.isfinite(m.weight.grad).all(): o.step()
""",
    "infinities_of_an_attention_mask": """
class M(nn.Module):
    def __init__(s):
        super().__init__()
        s.q=nn.Linear(6,6)
        s.h=nn.Linear(6,1)
    def forward(s,x):
        q=s.q(x); a=q@q.transpose(-1,-2); m=torch.triu(torch.full((4,4),float("-inf")),1)
        return s.h((a+m).softmax(-1)@q)
main(M, lambda m,i: m(torch.randn(2,4,6)).pow(2).mean())
""",
    "checkpoint_with_an_edit_through_data": """
class M(nn.Module):
    def __init__(s):
        super().__init__()
        s.f=nn.Sequential(nn.Linear(6,6),nn.ReLU(),nn.Linear(6,6))
        s.g=nn.Linear(6,6)
        s.h=nn.Linear(6,1)
        s.t=nn.Parameter(torch.zeros(6))
        nn.init.zeros_(s.g.weight)
    def forward(s,x):
        x=checkpoint(s.f,x,use_reentrant=False); x.data.clamp_(-100,100)
        return s.h(x+checkpoint(lambda v: s.g(s.f(v)),x,use_reentrant=False)*s.t)
main(M, lambda m,i: m(torch.randn(4,6)).pow(2).mean())
""",
    "attention_over_one_key_now_and_then": """
class M(nn.Module):
    def __init__(s):
        super().__init__()
        s.q=nn.Linear(6,6)
        s.h=nn.Linear(6,1)
    def forward(s,x):
        q=s.q(x); return s.h((q@q.transpose(-1,-2)).softmax(-1)@q)
main(M, lambda m,i: m(torch.randn(2,1 if i%3 else 4,6)).pow(2).mean())
""",
    "average_of_weights_through_data": """
m=nn.Linear(4,2)
t=copy.deepcopy(m)
o=torch.optim.SGD(m.parameters(),lr=1e-2)
for i in range(8):
    x=torch.randn(8,4)
    loss=(m(x)-t(x).detach()-1).pow(2).mean()
    o.zero_grad()
    loss.backward()
    o.step()
    for a,b in zip(t.parameters(), m.parameters()): a.data.mul_(0.9).add_(b.data, alpha=0.1)
""",
    "relu_network": """
class M(nn.Module):
    def __init__(s):
        super().__init__()
        s.f=nn.Linear(6,6)
        s.h=nn.Linear(6,1)
    def forward(s,x): return s.h(torch.relu(s.f(x)))
def loss(m,i):
    return m(torch.rand(4,6)).pow(2).mean()
main(M, loss)
""",
    "experts_without_tokens": """
class M(nn.Module):
    def __init__(s):
        super().__init__()
        s.g=nn.Linear(6,4)
        s.e=nn.ModuleList(nn.Linear(6,6) for _ in range(4))
        s.h=nn.Linear(6,1)
    def forward(s,x):
        p=s.g(x).softmax(-1); w,k=p.max(-1); out=torch.zeros_like(x)
        for i,e in enumerate(s.e):
            rows=(k==i).nonzero().squeeze(-1)
            out=out.index_add(0,rows,w[rows,None]*e(x[rows]))
        return s.h(out)
main(M, lambda m,i: m(torch.rand(3,6)).pow(2).mean(), steps=20)
""",
    "warmup_that_begins_with_rate_zero": """
m=nn.Linear(4,2)
o=torch.optim.SGD(m.parameters(),lr=1.0)
s=torch.optim.lr_scheduler.LambdaLR(o, lambda e: e/10)
for i in range(4):
    loss=m(torch.randn(3,4)).pow(2).mean()
    o.zero_grad()
    loss.backward()
    o.step()
    s.step()
""",
}

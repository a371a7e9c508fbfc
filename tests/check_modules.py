"""Forty right functions and modules, each drawn from a seed: none of their gradients may be called wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Case = tuple[Callable[..., Any], tuple[Any, ...]]
CASES: dict[str, Callable[[int], Case]] = {}


def case(make: Callable[[int], Case]) -> Callable[[int], Case]:
    CASES[make.__name__] = make
    return make


def drawn(name: str, seed: int) -> Case:
    torch.manual_seed(seed)
    return CASES[name](1 + seed % 4)


class Then(nn.Module):
    """A module and what is made of its output."""

    def __init__(self, inner: nn.Module, then: Callable[[Any], Any]) -> None:
        super().__init__()
        self.inner, self.then = inner, then

    def forward(self, *args: Any) -> Any:
        return self.then(self.inner(*args))


@case
def linear(n: int) -> Case:
    return nn.Linear(3 * n, 4), (torch.randn(2 + n, 3 * n),)


@case
def mlp_relu(n: int) -> Case:
    return nn.Sequential(nn.Linear(8, 16 * n), nn.ReLU(), nn.Linear(16 * n, 3)), (torch.randn(16, 8),)


@case
def mlp_cross_entropy(n: int) -> Case:
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 5))
    target = torch.randint(0, 5, (4 * n,))
    return (lambda x: F.cross_entropy(model(x), target, label_smoothing=0.1)), (torch.randn(4 * n, 8),)


@case
def conv_batchnorm_train(n: int) -> Case:
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
    x = torch.randn(3, 2, 4 + n, 5)
    model(x)
    return model, (x,)


@case
def batchnorm_eval(n: int) -> Case:
    model = nn.BatchNorm1d(3 + n)
    model(torch.randn(8, 3 + n) * 2 + 1)
    return model.eval(), (torch.randn(5, 3 + n),)


@case
def layer_norm(n: int) -> Case:
    return nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.GELU()), (torch.randn(n, 3, 6),)


@case
def group_norm(n: int) -> Case:
    return nn.Sequential(nn.Conv1d(2, 4, 3), nn.GroupNorm(2, 4), nn.SiLU()), (torch.randn(2, 2, 5 + n),)


@case
def rms_norm(n: int) -> Case:
    return nn.RMSNorm(4 * n, eps=1e-6), (torch.randn(3, 4 * n),)


@case
def instance_norm(n: int) -> Case:
    return nn.InstanceNorm2d(2, affine=True), (torch.randn(2, 2, 3 + n, 3),)


@case
def conv_transpose(n: int) -> Case:
    return nn.ConvTranspose2d(2, 3, 3, stride=2), (torch.randn(2, 2, 2 + n, 3),)


@case
def conv_grouped(n: int) -> Case:
    return nn.Conv2d(4, 4, 3, groups=2, dilation=1 + n % 2, bias=False), (torch.randn(1, 4, 7, 6),)


@case
def max_pool(n: int) -> Case:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2)), (torch.randn(n, 1, 8, 8),)


@case
def max_pool_of_integers(n: int) -> Case:
    return nn.MaxPool2d(2), (torch.randint(0, 3, (n, 1, 4, 4)).float(),)


@case
def average_pool(n: int) -> Case:
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()), (torch.randn(2, n, 5, 7),)


@case
def attention(n: int) -> Case:
    query, key, value = torch.randn(2, n, 8), torch.randn(2, 4, 8), torch.randn(2, 4, 8)
    return nn.MultiheadAttention(8, 2, batch_first=True), (query, key, value)


@case
def causal_attention(n: int) -> Case:
    q, k, v = torch.randn(3, 1, 2, 3 + n, 4)
    return (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)), (q, k, v)


@case
def encoder_layer(n: int) -> Case:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1 * (n % 2), batch_first=True)
    return (layer if n < 3 else layer.eval()), (torch.randn(2, 3, 8),)


@case
def lstm(n: int) -> Case:
    return nn.LSTM(3, 4, num_layers=1 + n % 2, bidirectional=n > 2, batch_first=True), (torch.randn(2, 2 + n, 3),)


@case
def gru(n: int) -> Case:
    return nn.GRU(3, 4), (torch.randn(1 + n, 2, 3), torch.randn(1, 2, 4))


@case
def rnn_of_packed_sequences(n: int) -> Case:
    model = nn.RNN(3, 4, batch_first=True)
    lengths = torch.tensor([3 + n, 2])

    def run(x: Tensor) -> Tensor:
        return model(nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True))[0].data

    return run, (torch.randn(2, 3 + n, 3),)


@case
def embedding(n: int) -> Case:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(4 * n, 3))
    return model, (torch.randint(0, 7, (5, n)),)


@case
def embedding_with_padding(n: int) -> Case:
    model = nn.Sequential(nn.Embedding(7, 4, padding_idx=0), nn.Flatten(), nn.Linear(4 * n, 3))
    return model, (torch.randint(0, 3, (5, n)),)


@case
def sparse_embedding_bag(n: int) -> Case:
    bag = nn.EmbeddingBag(7, 4, mode=("sum", "mean")[n % 2], sparse=n > 2)
    return bag, (torch.randint(0, 7, (3, n)),)


@case
def tied_language_model(n: int) -> Case:
    table, head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
    head.weight = table.weight
    return nn.Sequential(table, nn.LayerNorm(6), head), (torch.randint(0, 9, (2, 2 + n)),)


@case
def dropout(n: int) -> Case:
    return nn.Sequential(nn.Linear(6, 12), nn.Dropout(0.2 * n), nn.Linear(12, 3)), (torch.randn(4, 6),)


@case
def losses(n: int) -> Case:
    target = torch.randn(4, n)

    def run(x: Tensor) -> list[Tensor]:
        smooth = F.smooth_l1_loss(x, target, beta=0.3)
        return [F.mse_loss(x, target), smooth, F.huber_loss(x, target), F.l1_loss(x, target)]

    return run, (torch.randn(4, n),)


@case
def probabilities(n: int) -> Case:
    target = torch.rand(4, n)

    def run(x: Tensor) -> list[Tensor]:
        p = x.sigmoid()
        return [
            F.binary_cross_entropy(p, target),
            F.binary_cross_entropy_with_logits(x, target, reduction="none"),
            F.kl_div(x.log_softmax(0), target, reduction="batchmean"),
            F.poisson_nll_loss(x, target),
        ]

    return run, (torch.randn(4, n),)


@case
def ctc(n: int) -> Case:
    targets = torch.randint(1, 5, (2, 1 + n))
    lengths = torch.full((2,), 10), torch.full((2,), 1 + n)
    return (lambda x: F.ctc_loss(x.log_softmax(-1), targets, *lengths)), (torch.randn(10, 2, 5),)


@case
def relu_abs_at_random(n: int) -> Case:
    return (lambda x: (x.relu() + 2 * x.abs() - x.clamp(-0.5, 0.5)).cumsum(0)), (torch.randn(30 * n),)


@case
def relu_at_zero(n: int) -> Case:
    return nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 2)), (torch.zeros(n, 4),)


@case
def topk_and_sorting(n: int) -> Case:
    def run(x: Tensor) -> list[Tensor]:
        values, index = x.topk(2, dim=1)
        return [values, x.sort(descending=True).values.cumsum(1), index.float(), x.median(1).values, x.logsumexp(1)]

    return run, (torch.randn(2, 3 + n),)


@case
def cumulative_products(n: int) -> Case:
    return (lambda x: [x.cumprod(1), x.prod(), x.cummax(1).values, x.logcumsumexp(0)]), (torch.randn(2, 2 + n),)


@case
def product_with_a_zero(n: int) -> Case:
    x = torch.randn(2, 2 + n)
    x[0, 0] = 0
    return (lambda x: [x.cumprod(1), x.prod(1)]), (x,)


@case
def indexing(n: int) -> Case:
    index = torch.randint(0, 5, (3 * n,))

    def run(x: Tensor) -> list[Tensor]:
        scattered = torch.zeros(5, 3).index_add(0, index, x[index] ** 2)
        return [scattered, x.gather(0, index[:1].expand(1, 3)), x[x > 0].sum(), x.roll(1, 0) * x.flip(1)]

    return run, (torch.randn(5, 3),)


@case
def views_and_in_place(n: int) -> Case:
    def run(x: Tensor) -> Tensor:
        x.mul_(2)
        y = x.clone()
        y[:, 0] += x.sin()[:, 1]
        y.view(-1)[::2].exp_()
        return y.unfold(1, 2, 1).sum(-1).relu_()

    return run, (torch.randn(2, 3 + n),)


@case
def complex_fft(n: int) -> Case:
    def run(x: Tensor, z: Tensor) -> list[Tensor]:
        return [torch.fft.rfft(x), torch.fft.ifft(z * z.conj() + z), z.abs(), z.angle()]

    return run, (torch.randn(3, 4 + n), torch.randn(3, 4 + n, dtype=torch.complex64))


@case
def linear_algebra(n: int) -> Case:
    def run(x: Tensor, b: Tensor) -> list[Tensor]:
        spd = x @ x.mT + torch.eye(2 + n)
        return [torch.linalg.solve(spd, b), torch.logdet(spd), torch.linalg.cholesky(spd), torch.linalg.eigvalsh(spd)]

    return run, (torch.randn(2 + n, 2 + n), torch.randn(2 + n))


@case
def double_where(n: int) -> Case:
    def run(x: Tensor) -> Tensor:
        safe = torch.where(x > 0, x, torch.ones_like(x))
        return torch.where(x > 0, safe.sqrt(), torch.zeros_like(x))

    return run, (torch.randn(6 * n),)


@case
def positive_domain(n: int) -> Case:
    return (lambda x: [x.log(), x.sqrt(), x.rsqrt(), torch.lgamma(x), x.pow(0.3)]), (torch.rand(4 * n) + 1e-3,)


@case
def straight_through(n: int) -> Case:
    def run(x: Tensor, w: Tensor) -> Tensor:
        return (x + (x.round() - x).detach()) * w

    return run, (torch.randn(3, n) * 3, torch.randn(3, n))


@case
def weight_norm(n: int) -> Case:
    return nn.utils.parametrizations.weight_norm(nn.Linear(4, 3 * n)), (torch.randn(3, 4),)


@case
def spectral_norm_eval(n: int) -> Case:
    model = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3 + n), n_power_iterations=30)
    model(torch.randn(2, 4))
    return model.eval(), (torch.randn(3, 4),)


@case
def checkpointed(n: int) -> Case:
    from torch.utils.checkpoint import checkpoint

    inner = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.1 * n), nn.GELU(), nn.Linear(8, 5))
    return (lambda x: x + checkpoint(inner, x, use_reentrant=False)), (torch.randn(3, 5),)


@case
def mixture_of_experts(n: int) -> Case:
    gate, experts = nn.Linear(4, 3), nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def run(x: Tensor) -> Tensor:
        weight, chosen = gate(x).softmax(-1).topk(2)
        out = torch.zeros(x.shape)
        for k in range(2):
            for e, expert in enumerate(experts):
                rows = (chosen[:, k] == e).nonzero().flatten()
                out = out.index_add(0, rows, weight[rows, k, None] * expert(x[rows]))
        return out

    return run, (torch.randn(6 * n, 4),)


@case
def interpolation(n: int) -> Case:
    grid = torch.rand(1, 3, 3, 2) * 1.6 - 0.8

    def run(x: Tensor, grid: Tensor) -> list[Tensor]:
        return [
            F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False),
            F.grid_sample(x, grid, align_corners=False),
            F.pixel_shuffle(x.expand(1, 4, -1, -1), 2),
        ]

    return run, (torch.randn(1, 1, 4, 3 + n), grid)


@case
def distances(n: int) -> Case:
    return (lambda x, y: [torch.cdist(x, y), F.cosine_similarity(x, y), F.pairwise_distance(x, y)]), (
        torch.randn(3, n + 1),
        torch.randn(3, n + 1),
    )

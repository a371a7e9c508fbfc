"""The line of a finding as it should be written: derived from the line, or not told at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gradctl import watch
from gradctl._explain._context import Candidate
from gradctl._explain._mend import mend
from gradctl._lineage import Site


def mended(folder: Path, slug: str, text: str, line: int = 0) -> str:
    """Write a program, and return what is said of the one line that is marked, or of `line`."""
    lines = text.splitlines()
    at = line or next(n for n, one in enumerate(lines, 1) if one.endswith("# <"))
    file = folder / f"program{len(list(folder.iterdir()))}.py"
    file.write_text("\n".join(one.removesuffix("# <").rstrip() for one in lines) + "\n", encoding="utf-8")
    return mend(Candidate(slug, Site(str(file), at, "f"), "s", "w"))


@pytest.mark.parametrize(
    ("slug", "before", "after"),
    [
        ("detach", "x = f.detach()", "write `x = f`"),
        ("detach", "return out.detach()", "write `return out`"),
        ("detach", "return torch.relu(self.tower(x)).detach()", "write `return torch.relu(self.tower(x))`"),
        ("detach", "y = (a + b).detach() * c", "write `y = (a + b) * c`"),
        ("detach", "y = torch.detach(a + b) * c", "write `y = (a + b) * c`"),
        ("detach", "größe = messung.detach() * zwei", "write `größe = messung * zwei`"),
        ("detach", "y = x.detach().float()", "write `y = x.float()`"),
        ("detach", "loss = a.detach() + b.detach()", ""),
        ("detach", "y = x.detach().cpu().numpy()", ""),
        ("detach", "y = torch.tensor(x.detach())", ""),
        ("detach", "log(f'{x.detach()}')", ""),
        ("detach", "y = cut(x)", ""),
        ("data", "h = h0.data.view(-1)", "write `h = h0.view(-1)`"),
        ("data", "p.data = p - g", ""),
        ("item", "total += loss.item()", "write `total += loss`"),
        ("item", "return mse(a, b).item() + kl", "write `return mse(a, b) + kl`"),
        ("item", "scale = float(a.mean())", "write `scale = a.mean()`"),
        ("item", "scale = 1 - float(a - b)", "write `scale = 1 - (a - b)`"),
        ("item", "scale = float(a.mean().item())", "write `scale = a.mean()`"),
        ("item", "loss = torch.tensor(a.item())", ""),
        ("item", "loss = math.log(a.item())", ""),
        ("loss_not_tensor", "return loss.item()", "write `return loss`"),
        ("loss_not_tensor", "return 0", ""),
        ("missing_create_graph", "g = autograd.grad(y, x)[0]", "write `g = autograd.grad(y, x, create_graph=True)[0]`"),
        ("missing_create_graph", "g = grad(y, x, create_graph=False)", "write `g = grad(y, x, create_graph=True)`"),
        ("missing_create_graph", "g = grad(y, x, create_graph=self.training)[0]", ""),
        ("missing_create_graph", "g = grad(y, x, **options)[0]", ""),
        ("missing_create_graph", "g = self.slope(y, x)", ""),
        ("non_reparam_sample", "z = Normal(mu, sigma).sample()", "write `z = Normal(mu, sigma).rsample()`"),
        ("non_reparam_sample", "z = q.sample((4,)) + p.sample()", ""),
        ("argmax", "y = x.argmax()", ""),
    ],
)  # fmt: skip
def test_a_simple_line_is_written_anew(tmp_path: Path, slug: str, before: str, after: str) -> None:
    assert mended(tmp_path, slug, f"def f():\n    first()\n    {before}  # <\n") == after


def test_a_value_that_is_only_cut_needs_no_line_at_all(tmp_path: Path) -> None:
    text = "def f(h):\n    h = h.detach()  # <\n    return h\n"
    assert mended(tmp_path, "detach", text) == "drop this line `h = h.detach()`"
    text = "def f(h):\n    h.detach_()  # <\n    return h\n"
    assert mended(tmp_path, "detach", text) == "drop this line `h.detach_()`"
    text = "def f(h):\n    if h is not None:\n        h = h.detach()  # <\n    return h\n"
    assert mended(tmp_path, "detach", text) == ""


def test_a_call_over_several_lines_keeps_its_lines(tmp_path: Path) -> None:
    text = "def f(y, x):\n    (g,) = torch.autograd.grad(  # <\n        y,\n        x,\n    )\n    return g\n"
    text = text.replace("  # <", "")
    assert mended(tmp_path, "missing_create_graph", text, 2) == (
        "write:\n(g,) = torch.autograd.grad(\n    y,\n    x, create_graph=True\n)"
    )


def test_a_decorator_is_named_with_its_function(tmp_path: Path) -> None:
    text = "class Net:\n    @cached\n    @torch.no_grad()  # <\n    def encode(self, x):\n        return x\n"
    assert mended(tmp_path, "no_grad", text) == "drop `@torch.no_grad()` above encode"
    assert mended(tmp_path, "no_grad", text.replace("  # <", ""), 2) == ""
    assert mended(tmp_path, "no_grad", "with torch.no_grad():  # <\n    y = f(x)\n") == ""


def test_clearing_too_late_moves_above_the_backward_of_its_block(tmp_path: Path) -> None:
    text = (
        "for x in data:\n    loss = f(x)\n    loss.backward()\n    clip()\n    opt.zero_grad()  # <\n    opt.step()\n"
    )
    assert mended(tmp_path, "zero_grad_misplaced", text) == "move `opt.zero_grad()` above `loss.backward()`"
    assert mended(tmp_path, "zero_grad_misplaced", text.replace("loss.backward()", "train(loss)")) == ""


@pytest.mark.parametrize("slug", ["detach", "item", "no_grad", "zero_grad_misplaced"])
def test_a_file_that_cannot_be_read_gives_no_code(tmp_path: Path, slug: str) -> None:
    assert mend(Candidate(slug, Site(str(tmp_path / "gone.py"), 3, "f"), "s", "w")) == ""
    assert mend(Candidate(slug, Site("<string>", 1, "f"), "s", "w")) == ""
    assert mend(Candidate(slug, None, "s", "w")) == ""


def test_of_two_cuts_on_a_line_the_traced_one_is_mended() -> None:
    model = torch.nn.ModuleDict({"kept": torch.nn.Linear(2, 1), "lost": torch.nn.Linear(2, 1)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.ones(3, 2)
    with watch(model, optimizer, quiet=True) as seen:
        for _ in range(4):
            optimizer.zero_grad()
            y = model["kept"](x) + model["lost"](x).detach() * x.detach().sum()
            y.sum().backward()
            optimizer.step()
    assert [finding.slug for finding in seen.findings] == ["detach"]
    assert seen.findings[0].fix == 'write `y = model["kept"](x) + model["lost"](x) * x.detach().sum()`'

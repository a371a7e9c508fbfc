"""Whole programs print the same digits under `gradctl run`, and their journals say what they did.

The oracle of each program is itself under plain Python: its output, its exit code, and the number of steps it counts.
"""

from __future__ import annotations

import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from gradctl import _verdict
from gradctl._journal import Journal, Run
from starting import GRADCTL, Outcome, environment, launch

PROGRAMS = Path(__file__).parent / "programs_run"
TORCHRUN = (
    *("-m", "torch.distributed.run", "--nproc-per-node", "2"),
    *("--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"),
)
# Gloo's threads may outlive the process group and end a rank after its last line, under plain Python too: 1 of 20 runs
# of ddp.py. Such a run says nothing about the program and is started again.
TEARDOWN = "terminate called without an active exception"
COUNTED = re.compile(r"(?:optimizer steps|optimizer steps of children|distributed steps|backwards): ([\d ]+)")


@dataclass(frozen=True)
class Program:
    """A program and what its journals must hold.

    Args:
        name: file in `programs_run`.
        ranks: processes that torchrun starts; 0 without it.
        children: journals of Python children.
        names: names that the journal must give, in order, of the first optimizer.
        slow: `make test-all` only.
        findings: slugs above a note that are right for this program.
    """

    name: str
    ranks: int = 0
    children: int = 0
    names: tuple[str, ...] = ()
    slow: bool = False
    findings: tuple[str, ...] = ()


ALL = (
    Program("trainer_bert", names=("bert.embeddings.word_embeddings.weight",)),
    Program("lightning_module", names=("net.0.weight", "net.0.bias", "net.1.weight", "net.1.bias")),
    Program("gan", names=tuple(f"discriminator.net.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias"))),
    Program("lbfgs", names=("weight", "bias")),
    Program("maml", names=("0.weight", "0.bias", "2.weight", "2.bias")),
    Program("grad_scaler", names=("0.weight", "0.bias", "2.weight", "2.bias")),
    Program("manual_loop", names=("w1", "b1", "w2", "b2")),
    Program("ddp", ranks=2, names=("0.weight", "0.bias", "2.weight", "2.bias")),
    Program("trainer_gpt2", names=("transformer.wte.weight", "transformer.wpe.weight"), slow=True),
    Program("lightning_gan", names=("generator.0.weight", "generator.0.bias"), slow=True),
    Program("accelerate_loop", names=("0.weight", "0.bias"), slow=True),
    Program(
        "peft_lora",
        names=("base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.default.weight",),
        slow=True,
    ),
    Program("vision", names=("resnet.embedder.embedder.convolution.weight",), slow=True),
    Program("reinforce", names=("body.weight", "body.bias", "head.weight", "head.bias"), slow=True),
    Program("dqn", names=("0.weight", "0.bias", "2.weight", "2.bias"), slow=True),
    Program("per_sample", names=("0.weight", "0.bias", "2.weight", "2.bias"), slow=True),
    Program("create_graph", names=("0.weight", "0.bias", "2.weight", "2.bias"), slow=True),
    Program("manual_module", names=("0.weight", "0.bias", "2.weight", "2.bias"), slow=True),
    Program("accumulate", names=("0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"), slow=True),
    Program("autocast_bf16", names=("embed.weight", "body.layers.0.self_attn.in_proj_weight"), slow=True),
    Program("checkpointing", names=("0.weight", "0.bias", "1.inner.0.weight"), slow=True),
    Program("teacher_student", names=("first.weight", "first.bias", "last.weight", "last.bias"), slow=True),
    Program("sparse_embedding", names=("table.weight",), slow=True),
    Program("hogwild", names=("0.weight", "0.bias", "2.weight", "2.bias"), slow=True),
    Program("compiled", names=("0.weight", "0.bias", "2.weight", "2.bias"), slow=True),
    Program("compiled_inductor", names=("0.weight", "0.bias", "2.weight", "2.bias"), slow=True),
    Program("spawn", children=2, names=("weight", "bias"), slow=True),
    Program("rpc_autograd", children=1, slow=True),
    Program("fsdp2", ranks=2, names=("0.weight", "0.bias", "1.up.weight", "1.up.bias"), slow=True),
    Program("pipeline", ranks=2, names=("0.weight", "0.bias"), slow=True),
    Program("zero_redundancy", ranks=2, names=("0.weight", "0.bias", "2.weight", "2.bias"), slow=True),
    Program("exit_three", names=("weight", "bias"), slow=True),
    Program("uncaught", names=("weight", "bias"), slow=True),
)


def marked(program: Program) -> object:
    marks = [pytest.mark.slow] * program.slow + [pytest.mark.distributed] * (program.ranks > 0)
    return pytest.param(program, id=program.name, marks=marks)


def both(program: Program, folder: Path) -> tuple[Outcome, Outcome]:
    """Run a program plain and recorded, side by side."""
    script = str(PROGRAMS / f"{program.name}.py")
    options = ("--out", str(folder / "run"), "-q", *(() if program.slow else ("--no-report",)))
    launcher = TORCHRUN if program.ranks else ()
    commands = (
        [sys.executable, *launcher, script],
        [sys.executable, *launcher, *GRADCTL[1:], *options, script],
    )
    env = environment(PYTHONWARNINGS=None)

    def start(command: list[str], left: Path | None) -> Outcome:
        outcome = launch(command, folder, env=env)
        for _ in range(3 if program.ranks else 0):
            if TEARDOWN not in outcome.stderr:
                break
            if left is not None:
                shutil.rmtree(left)
            outcome = launch(command, folder, env=env)
        return outcome

    with ThreadPoolExecutor(2) as pool:
        plain, recorded = pool.map(start, commands, (None, folder / "run"))
    return plain, recorded


def steps_of(journals: list[Journal]) -> list[int]:
    ends = [journal.end for journal in journals]
    assert all(end is not None for end in ends), "a journal has no end"
    return sorted(steps for end in ends if end is not None for steps in end.steps.values())


@pytest.mark.parametrize("program", [marked(program) for program in ALL])
def test_a_program_prints_the_same_and_its_journal_says_what_it_did(program, tmp_path):
    plain, recorded = both(program, tmp_path)
    assert recorded.stdout == plain.stdout
    assert recorded.code == plain.code, recorded.stderr

    assert (tmp_path / "run").is_dir(), recorded.stderr
    run = Run.load(tmp_path / "run")
    mains = [journal for journal in run.journals if journal.run is not None and journal.run.main]
    assert len(mains) == max(1, program.ranks)
    assert len(run.journals) - len(mains) == program.children
    counted = COUNTED.search(plain.stdout)
    assert counted is not None, plain.stdout + plain.stderr
    expected = sorted(int(word) for word in counted.group(1).split())
    if program.ranks:
        for journal in mains:
            assert steps_of([journal]) == expected
    else:
        assert steps_of(list(run.journals)) == expected

    for journal in run.journals:
        assert journal.end is not None
        assert journal.end.faults == 0, [event for event in journal.events if event.e == "fault"]
        assert journal.bad_lines == 0
        for optimizer in journal.optimizers.values():
            assert None not in optimizer.names
            assert len(set(optimizer.names)) == len(optimizer.names)
    first = next(journal.optimizers[0] for journal in run.journals if journal.optimizers)
    assert first.names[: len(program.names)] == program.names

    found = [finding.slug for finding in _verdict.judge(run).findings if finding.severity != "note"]
    assert found == list(program.findings)
    if program.slow:
        assert (tmp_path / "run" / "report.html").stat().st_size > 10_000


def test_a_training_script_under_grad_off_is_refused_at_its_line(tmp_path):
    script = PROGRAMS / "lbfgs.py"
    line = 1 + script.read_text().splitlines().index("    loss.backward()")
    command = [*GRADCTL, "--grad", "off", "-q", "--no-report", "--out", str(tmp_path / "run"), str(script)]
    refused = launch(command, tmp_path)
    assert refused.code == 1
    assert refused.stdout == ""
    assert "BackwardRefused: backward refused" in refused.stderr
    assert f"{script}:{line} in closure: loss.backward()" in refused.stderr
    (journal,) = Run.load(tmp_path / "run").journals
    assert journal.end is not None
    assert journal.end.code == 1

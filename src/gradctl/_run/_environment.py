"""What `gradctl env` says: what is installed, which means each feature would use here, what is missing and why."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from importlib.machinery import PathFinder
from typing import Any

SCHEMA = "gradctl.env/1"
REQUIRED = ("torch", "numpy", "click", "rich", "jinja2")
OPTIONAL = (
    "transformers", "lightning", "accelerate", "peft", "deepspeed", "scikit-learn", "fastapi", "uvicorn",
)  # fmt: skip
LAUNCHERS = ("torchrun", "accelerate", "deepspeed", "mpirun", "srun")


@dataclass(frozen=True, slots=True)
class Feature:
    """One feature and the means by which it would work here.

    Args:
        name: the feature.
        means: what it would use.
        notes: why not something better, and what it does not cover; one fact a line.
        available: whether it would work at all.
    """

    name: str
    means: str
    notes: tuple[str, ...] = ()
    available: bool = True


@dataclass(frozen=True, slots=True)
class PrivateName:
    """A private torch name that gradctl uses.

    Args:
        path: `module:attribute`.
        found: whether this torch has it.
        needed_by: the features that use it.
        without: what happens if it is gone.
    """

    path: str
    found: bool
    needed_by: str
    without: str


@dataclass(frozen=True, slots=True)
class Environment:
    """What is installed and what would work here.

    Args:
        gradctl: version.
        python: version and implementation.
        executable: path of the interpreter.
        platform: operating system, its version, machine and C library.
        torch: version, or None when it cannot be imported.
        torch_error: why it cannot be imported.
        cpu_cores: cores that this process may use.
        torch_threads: threads of one operation.
        gpus: names of the GPUs that torch sees.
        features: what each feature would use.
        private_names: private names of torch, found or not.
        launchers: launchers on PATH or beside the interpreter, with their paths.
        rank: rank and world size when started by a launcher.
        packages: versions of required and optional packages; None where one is missing.
    """

    gradctl: str
    python: str
    executable: str
    platform: str
    torch: str | None
    torch_error: str | None
    cpu_cores: int
    torch_threads: int | None
    gpus: tuple[str, ...]
    features: tuple[Feature, ...]
    private_names: tuple[PrivateName, ...]
    launchers: dict[str, str]
    rank: tuple[int, int] | None
    packages: dict[str, str | None]

    def to_json(self) -> dict[str, Any]:
        """Return it as `gradctl.env/1`."""
        return {"schema": SCHEMA, **asdict(self)}

    def __str__(self) -> str:
        rank = f"rank {self.rank[0]} of {self.rank[1]}" if self.rank else "none here"
        lines = [
            f"gradctl    {self.gradctl}",
            f"python     {self.python}  {self.executable}",
            f"platform   {self.platform}",
            f"torch      {self.torch or f'cannot be imported: {self.torch_error}'}",
            f"cpu        {self.cpu_cores} cores"
            + (f"; threads of one operation: {self.torch_threads}" if self.torch_threads else ""),
            f"gpu        {', '.join(self.gpus) or 'none'}",
            f"launcher   {rank}; installed: {', '.join(self.launchers) or 'none'}",
        ]
        for feature in self.features:
            lines.append(f"\n{feature.name:<10} {'' if feature.available else 'not available: '}{feature.means}")
            lines += [f"{'':<10} - {note}" for note in feature.notes]
        missing = [name for name in self.private_names if not name.found]
        if self.private_names:
            lines.append(
                f"\nprivate names of torch: {len(self.private_names) - len(missing)} found, {len(missing)} missing"
            )
        for name in self.private_names:
            lines.append(
                f"  {'found  ' if name.found else 'MISSING'}  {name.path.replace(':', '.')}  ({name.needed_by})"
            )
            if not name.found:
                lines.append(f"           without it: {name.without}")
        lines.append("\npackages")
        lines += [f"  {package:<14} {version or '-'}" for package, version in self.packages.items()]
        return "\n".join(lines)


def describe() -> Environment:
    """Look at this interpreter, its torch and its packages; imports torch, switches and changes nothing.

    Returns:
        What was found; a torch that is missing or broken is part of the answer, not an error.
    """
    import gradctl
    from gradctl._run import _launcher

    torch, torch_error = _import_torch()
    rank = _launcher.find(os.environ)
    return Environment(
        gradctl=gradctl.__version__,
        python=f"{platform.python_version()} ({platform.python_implementation()})",
        executable=sys.executable,
        platform=platform.platform(),
        torch=None if torch is None else str(torch.__version__),
        torch_error=torch_error,
        cpu_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        torch_threads=None if torch is None else int(torch.get_num_threads()),
        gpus=() if torch is None else _gpus(torch),
        features=_features(torch_error),
        private_names=() if torch is None else _private_names(),
        launchers={name: path for name in LAUNCHERS if (path := _which(name))},
        rank=(rank.rank, rank.world_size) if rank.world_size > 1 else None,
        packages={name: _version(name) for name in (*REQUIRED, *OPTIONAL)},
    )


def _import_torch() -> tuple[Any, str | None]:
    try:
        import torch
    # A broken torch raises anything from OSError (a library is missing) to RuntimeError; it is what is asked for here.
    except Exception as error:
        return None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return torch, None


def _gpus(torch: Any) -> tuple[str, ...]:
    if not torch.cuda.is_available():
        return ()
    return tuple(str(torch.cuda.get_device_name(index)) for index in range(torch.cuda.device_count()))


def _private_names() -> tuple[PrivateName, ...]:
    from gradctl import _torch_private

    return tuple(
        PrivateName(entry.path, found, entry.needed_by, entry.without)
        for entry, found in _torch_private.probe().items()
    )


def _features(torch_error: str | None) -> tuple[Feature, ...]:
    report = Feature("report", "HTML page and terminal summary, without torch")
    if torch_error is not None:
        return (
            Feature("off", "torch cannot be imported", available=False),
            Feature("run", "torch cannot be imported", available=False),
            report,
        )
    return _off(), _run(), report


def _off() -> Feature:
    from gradctl import _off

    engine = _off.engine_report()
    means = {
        "slot": f"the import slot of {', '.join(engine.libraries)}: every thread, Python's and C++'s",
        "portable": "the portable engine: thread by thread",
    }.get(engine.engine, engine.engine)
    notes = [] if engine.why is None else [f"not the import slot: {engine.why}"]
    notes.append(
        f"autograd.Function: {engine.function_apply}"
        + (f" ({engine.function_apply_why})" if engine.function_apply_why else "")
    )
    return Feature("off", means, (*notes, *(f"not covered: {gap}" for gap in engine.not_covered)))


def _run() -> Feature:
    notes = ["not seen: children started with -I, -E or -S, other interpreters, containers"]
    shadowed = PathFinder.find_spec("sitecustomize", sys.path)
    if shadowed is not None and shadowed.origin:
        notes.append(f"chains to {shadowed.origin}")
    return Feature("run", f"becomes the script: {sys.executable} with an injected sitecustomize", tuple(notes))


def _which(program: str) -> str | None:
    # An environment that is not activated has its programs beside its interpreter only.
    folders = (os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath))
    return shutil.which(program, path=os.pathsep.join(folders))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None

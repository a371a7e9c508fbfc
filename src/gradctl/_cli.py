"""The verbs of the command line and their help texts; what they do is elsewhere, and loaded when a verb is used."""

from __future__ import annotations

import contextlib
import difflib
import enum
import os
import signal
import sys
import traceback
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from gradctl import __version__
from gradctl._errors import GradctlError, UsageError


class ExitCode(enum.IntEnum):
    """What the exit code of a verb means; `run` passes the script's own code through instead."""

    CLEAN = 0
    FINDINGS = 1
    USAGE = 2
    FAULT = 3
    NO_VERDICT = 4


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and end the process with its exit code."""
    try:
        code: object = gradctl.main(args=arguments, prog_name="gradctl", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except GradctlError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(ExitCode.USAGE if isinstance(error, UsageError) else ExitCode.FAULT)
    except click.Abort:
        sys.exit(130)
    except Exception:
        traceback.print_exc()
        print("gradctl failed by a fault of its own (above); the script, if one ran, is not to blame.", file=sys.stderr)
        sys.exit(ExitCode.FAULT)
    sys.exit(code if isinstance(code, int) else ExitCode.CLEAN)


@contextlib.contextmanager
def _reader_may_leave() -> Generator[None]:
    """End as any other program in a pipe does when its reader leaves (`gradctl report RUN | head`): without a word."""
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still buffered goes nowhere
        raise click.exceptions.Exit(128 + signal.SIGPIPE) from None


class _Verbs(click.Group):
    """A group that says what was meant when a verb is not known."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with _reader_may_leave():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        with _reader_may_leave():
            return super().invoke(ctx)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        word = args[0]
        if self.get_command(ctx, word) is None and not word.startswith("-"):
            near = difflib.get_close_matches(word, self.list_commands(ctx), n=2, cutoff=0.5)
            if word.endswith(".py") or os.path.isfile(word):
                hint = f" Did you mean `gradctl run {word}`?"
            elif near:
                hint = f" Did you mean {' or '.join(f'`{verb}`' for verb in near)}?"
            else:
                hint = f" There are: {', '.join(self.list_commands(ctx))}."
            ctx.fail(f"No such verb '{word}'.{hint}")
        return super().resolve_command(ctx, args)


class _RunCommand(click.Command):
    """Takes its own options up to SCRIPT, -m or -c and leaves everything from there on untouched.

    Options of the interpreter (-O, -u, -W ignore, -X dev ...) may stand among ours and are handed to it.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ours, command = split_run_arguments(args, value_options=self._value_options())
        # Without the guard, an option at the end that lacks its value would take the "--" for it.
        return super().parse_args(ctx, [*ours, "--", *command] if command else ours)

    def _value_options(self) -> frozenset[str]:
        options = (param for param in self.params if isinstance(param, click.Option) and not param.is_flag)
        return frozenset(name for option in options for name in option.opts)


_INTERPRETER_FLAGS = frozenset("bBdEiIOPRsSuvx")
_INTERPRETER_VALUES = frozenset("WX")
_INTERPRETER_TARGETS = frozenset("cm")


def split_run_arguments(args: Sequence[str], *, value_options: frozenset[str]) -> tuple[list[str], list[str]]:
    """Split the arguments of `gradctl run` into our options and the interpreter's command line.

    Args:
        args: everything after `run`.
        value_options: those of our options that take a value.

    Returns:
        Our options, and what the interpreter gets: its flags, then SCRIPT, `-m MODULE` or `-c CODE`, then ARGS.
    """
    ours: list[str] = []
    flags: list[str] = []
    position = 0
    while position < len(args):
        word = args[position]
        if word == "--":
            return ours, [*flags, *args[position + 1 :]]
        if word == "-" or not word.startswith("-"):
            break
        if word in value_options:
            ours += args[position : position + 2]
            position += 2
        elif word == "--check-hash-based-pycs":
            flags += args[position : position + 2]
            position += 2
        elif word.startswith("--"):
            ours.append(word)
            position += 1
        else:
            kind, width = _interpreter_word(word)
            if kind == "target":
                break
            (flags if kind == "flag" else ours).extend(args[position : position + width])
            position += width
    return ours, [*flags, *args[position:]]


def _interpreter_word(word: str) -> tuple[str, int]:
    """Say what short options are to the interpreter, "flag", "target" or "other", and how many words they take."""
    letters = word[1:]
    for place, letter in enumerate(letters):
        if letter in _INTERPRETER_TARGETS:
            return "target", 1
        if letter in _INTERPRETER_VALUES:
            return "flag", 1 if place + 1 < len(letters) else 2
        if letter not in _INTERPRETER_FLAGS:
            return "other", 1
    return "flag", 1


def script_name(command: Sequence[str]) -> str | None:
    """Return what stands for the script in an interpreter's command line: its path, the module, or `-c`.

    None when the command line names no program.
    """
    position = 0
    while position < len(command):
        word = command[position]
        if word == "-" or not word.startswith("-"):
            return word
        if word == "--check-hash-based-pycs":
            position += 2
            continue
        kind, width = _interpreter_word(word)
        if kind == "target":
            place = next(place for place, letter in enumerate(word) if letter in _INTERPRETER_TARGETS)
            rest = [word[place + 1 :]] if word[place + 1 :] else [*command[position + 1 : position + 2]]
            return None if not rest else "-c" if word[place] == "c" else rest[0]
        position += width
    return None


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="gradctl", message="%(prog)s %(version)s")
def gradctl() -> None:
    """Control, explain and prove what gradients do in a PyTorch program.

    \b
    gradctl run train.py --epochs 3      watch any script, unchanged
    gradctl run --grad off serve.py      no gradients, in any thread or child
    gradctl report gradctl-runs/...      look at a run again
    gradctl explain train.py             which line loses the gradient?
    gradctl memory train.py              where are the bytes of a step?
    gradctl cause detach                 about one cause
    gradctl fit --memory 8GiB train.py   recompute what does not fit

    \b
    Exit codes: `run` passes the script's through. Other verbs:
      0 clean   1 findings   2 usage   3 a failure of gradctl   4 no verdict
    """  # noqa: D301  (click reads the control character, not the two letters)


@gradctl.command(cls=_RunCommand, options_metavar="[OPTIONS]", short_help="Run a script, watch its gradients, report.")
@click.option(
    "--grad", type=click.Choice(["on", "off"]), help="`off` refuses every gradient, in all threads and children."
)
@click.option("--out", metavar="DIR", help="The run directory.  [default: gradctl-runs/<script>-<UTC time>[-NAME]]")
@click.option("--name", metavar="NAME", help="A word for the end of the run directory's name.")
@click.option("--policy", metavar="FILE", help="The policy file.  [default: found upward from here]")
@click.option("--plan", metavar="PLAN.json", help="Apply what `gradctl fit -o` wrote.")
@click.option(
    "--watch-steps", metavar="N", type=click.IntRange(min=1), help="Record only the first N steps, and trace them."
)
@click.option(
    "--on-nonfinite",
    type=click.Choice(["continue", "explain", "stop"]),
    help="At the first NaN or inf gradient; `stop` raises before the update, `explain` traces the steps after it.",
)
@click.option("--lines", is_flag=True, default=None, help="Record what backward remembers by source line.")
@click.option(
    "--budget", metavar="SHARE", type=float, help="Most of the wall time to spend on sampling.  [default: 0.01]"
)
@click.option("--no-report", "report", flag_value=False, is_flag=True, default=None, help="Draw no report at the end.")
@click.option("-q", "--quiet", is_flag=True, default=None, help="Say nothing of our own on the terminal.")
@click.option("--force", is_flag=True, default=None, help="Write into a run directory that already holds a run.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="(SCRIPT | -m MODULE | -c CODE) [ARGS]...")
@click.pass_context
def run(ctx: click.Context, /, command: tuple[str, ...], policy: str | None, **flags: object) -> None:
    """Run SCRIPT as `python SCRIPT ARGS` would, and watch its gradients.

    The script is not edited and its exit code is passed through. What was seen goes to the run directory: a journal for
    each process, and report.html, drawn when the script ends.

    Options before SCRIPT are ours, everything after it is the script's. Options of the interpreter (-O, -u, -W ignore,
    -X dev ...) may stand before SCRIPT too. Under a launcher: torchrun ... -m gradctl run train.py
    """
    script = script_name(command)
    if script is None:
        ctx.fail("Missing SCRIPT, -m MODULE or -c CODE: what to run.")
    from gradctl import _policy, _run

    settings = _policy.resolve(flags=flags, file=Path(policy) if policy else None)
    _run.start(command, settings, script)


@gradctl.command(short_help="Show a run again: terminal, HTML page, JSON.")
@click.argument("run_dir", metavar="RUN_DIR")
@click.option("-o", "page", metavar="FILE.html", help="Where to write the page.  [default: RUN_DIR/report.html]")
@click.option("--json", "json_file", metavar="FILE", help="Write gradctl.summary/1; `-` prints it, and nothing else.")
@click.option("--force", is_flag=True, help="Replace files that exist.")
def report(run_dir: str, page: str | None, json_file: str | None, force: bool) -> int:
    """Show what the gradients of a run did, from its journals. Works while the script is still running, too.

    Prints the summary and writes the page; one that is there already is kept unless --force is given.
    """
    from gradctl import report as view

    recorded = view.load(run_dir)
    if json_file is not None:
        _write_json(view.summary(recorded), json_file, force=force)
    drawn: Path | None = None
    kept = False
    if page is not None:
        drawn = view.write_page(recorded, page, force=force)
    elif json_file is None:
        drawn = Path(run_dir) / view.PAGE
        kept = drawn.exists() and not force
        if not kept:
            view.write_page(recorded, drawn)
    if json_file != "-":
        from rich.console import Console

        view.draw_terminal(recorded, console=Console(highlight=False), page=drawn, kept=kept)
    return ExitCode.CLEAN


@gradctl.command(cls=_RunCommand, options_metavar="[OPTIONS]", short_help="Say which line loses a gradient, and why.")
@click.option("--full", is_flag=True, help="Trace at once: one slow run instead of one or two.")
@click.option("--steps", metavar="N", type=click.IntRange(min=1), help="End the traced run after N optimizer steps.")
@click.option(
    "--at-step", metavar="N", type=click.IntRange(min=1), help="The step that matters, numbered as in the report."
)
@click.option("--into", metavar="PACKAGE", multiple=True, help="Treat this installed package as your own code.")
@click.option("--notes", is_flag=True, help="Also list breaks that do no harm.")
@click.option("--no-rerun", "rerun", flag_value=False, is_flag=True, default=True, help="Never run the script twice.")
@click.option(
    "--json", "json_file", metavar="FILE", help="Write gradctl.findings/1; `-` prints only that, the script on stderr."
)
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="(SCRIPT | -m MODULE | -c CODE) [ARGS]...")
@click.pass_context
def explain(
    ctx: click.Context,
    /,
    command: tuple[str, ...],
    full: bool,
    steps: int | None,
    at_step: int | None,
    into: tuple[str, ...],
    notes: bool,
    rerun: bool,
    json_file: str | None,
) -> int:
    """Run SCRIPT, and if its gradients are not sound, name the line that lost, froze, zeroed or poisoned them.

    The first run is the script's own, watched at almost no cost. Only if something is wrong, the script is run a second
    time, traced and out of sight, until the cause is known; what it does to files and services then happens twice.

    
    Exit codes: 0 clean   1 findings   2 usage   3 a failure of gradctl
      4 no verdict: the script failed for a reason of its own, or the cause was not found
    """
    script = script_name(command)
    if script is None:
        ctx.fail("Missing SCRIPT, -m MODULE or -c CODE: what to explain.")
    if json_file is not None:
        _check_free(json_file)
    from gradctl import _run

    options = _run.Options(
        full=full,
        steps=steps,
        at_step=at_step,
        into=into,
        notes=notes,
        rerun=rerun,
        script_to_stderr=json_file == "-",
    )
    found = _run.explain(command, script, options)
    if found is None:
        return ExitCode.CLEAN  # another rank says what was found
    if json_file is not None:
        _write_json(found.to_json(), json_file)
    if json_file != "-":
        from rich.console import Console

        from gradctl import report as view

        view.draw_explanation(found, console=Console(highlight=False))
    elif not found.findings or found.exit_code not in (ExitCode.CLEAN, ExitCode.FINDINGS):
        click.echo(f"gradctl: {found.sentence}", err=True)
    return found.exit_code


@gradctl.command(cls=_RunCommand, options_metavar="[OPTIONS]", short_help="Fit a training step into a byte budget.")
@click.option("--memory", metavar="SIZE", required=True, help="The budget: 8GiB, 512MiB, 1e9; a bare number is bytes.")
@click.option("-o", "plan_file", metavar="PLAN.json", help="Write the plan, for `gradctl run --plan`.")
@click.option(
    "--json", "json_file", metavar="FILE", help="Write gradctl.plan/1; `-` prints only that, the script on stderr."
)
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="(SCRIPT | -m MODULE | -c CODE) [ARGS]...")
@click.pass_context
def fit(
    ctx: click.Context, /, command: tuple[str, ...], memory: str, plan_file: str | None, json_file: str | None
) -> int:
    """Run SCRIPT until its model is fitted: a step then stays within SIZE, with bitwise the same gradients.

    The budget is the peak of allocated bytes on the model's device over a step, with weights, gradients, optimizer
    state and inputs. What to keep and what to make again in backward is chosen from the script's third step and
    measured in those after it; then the script is ended. Until then it runs with as little memory as it can.

    \b
    Exit codes: 0 fitted   1 no plan is that small (the smallest budget is said)
      2 usage   3 a failure of gradctl   4 no verdict: too few steps, or the script failed
    """  # noqa: D301
    script = script_name(command)
    if script is None:
        ctx.fail("Missing SCRIPT, -m MODULE or -c CODE: what to fit.")
    for file in (plan_file, json_file):
        if file is not None:
            _check_free(file)
    from gradctl import _run

    found = _run.fit(command, script, memory, script_to_stderr=json_file == "-")
    if found.plan is not None:
        for file in dict.fromkeys((plan_file, json_file)):
            if file is not None:
                _write_json(found.plan, file)
    if json_file != "-" or found.plan is None:
        click.echo(f"gradctl: {found.text}" if found.plan is None else found.text, err=found.plan is None)
        if plan_file is not None and found.plan is not None:
            click.echo(f"  {plan_file}: gradctl run --plan {plan_file} {' '.join(command)}")
    return found.exit_code


@gradctl.command(cls=_RunCommand, options_metavar="[OPTIONS]", short_help="Say where the bytes of one step are.")
@click.option("--step", metavar="N", type=click.IntRange(min=2), default=3, help="The step to measure.  [default: 3]")
@click.option(
    "--json", "json_file", metavar="FILE", help="Write gradctl.memory/1; `-` prints only that, the script on stderr."
)
@click.option("--pickle", "pickle_file", metavar="FILE", help="Write a snapshot for pytorch.org/memory_viz.")
@click.option("--out", metavar="DIR", help="The run directory.  [default: gradctl-runs/<script>-<UTC time>]")
@click.option("--no-report", "report", flag_value=False, is_flag=True, default=None, help="Draw no page at the end.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="(SCRIPT | -m MODULE | -c CODE) [ARGS]...")
@click.pass_context
def memory(
    ctx: click.Context,
    /,
    command: tuple[str, ...],
    step: int,
    json_file: str | None,
    pickle_file: str | None,
    **flags: object,
) -> None:
    """Run SCRIPT as `gradctl run` would, and say where the bytes of one of its steps are.

    Step N is what runs between the optimizer's step N-1 and its step N. The report goes to stderr when the script ends:
    what is alive at the peak and what is saved for backward, by module and line. The exit code is the script's.
    """
    script = script_name(command)
    if script is None:
        ctx.fail("Missing SCRIPT, -m MODULE or -c CODE: what to measure.")
    told: dict[str, Any] = {"step": step}
    for key, file in (("json", json_file), ("pickle", pickle_file)):
        if file is not None and (file != "-" or key == "pickle"):
            _check_free(file)
            told[key] = os.path.abspath(file)
    from gradctl import _policy, _run

    settings = _policy.resolve(flags=flags)
    if settings.grad == "off":
        raise UsageError("without gradients there is no step to measure", fix="leave out grad = off of the policy file")
    if json_file == "-":
        told["descriptor"] = os.dup(1)
        os.set_inheritable(told["descriptor"], True)
        os.dup2(2, 1)
    _run.start(command, settings, script, memory=told)


@gradctl.command(short_help="Tell about one cause, or list them all.")
@click.argument("slug", required=False)
def cause(slug: str | None) -> int:
    """Tell about a cause that `gradctl explain` names: symptom, smallest example, why, fix. Without SLUG, list all."""
    from rich.console import Console

    from gradctl import report as view

    view.draw_cause(slug, console=Console(highlight=False))
    return ExitCode.CLEAN


@gradctl.command(short_help="Say what works here, by which means, and what does not.")
@click.option("--json", "json_file", metavar="FILE", help="Write it as JSON; `-` prints it.")
def env(json_file: str | None) -> int:
    """Say what is installed, which engine each feature would use here, and what is not available and why."""
    from gradctl._run import _environment

    found = _environment.describe()
    if json_file is None:
        click.echo(str(found))
    else:
        _write_json(found.to_json(), json_file)
    return ExitCode.CLEAN


def _write_json(data: dict[str, Any], file: str, *, force: bool | None = None) -> None:
    import json

    # NaN is not JSON: a value that is not finite must already be text or null here.
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)
    if file == "-":
        click.echo(text)
        return
    path = Path(file)
    if not force:
        _check_free(file, force_helps=force is not None)
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {path}", why=error.strerror or str(error)) from error


def _check_free(file: str, *, force_helps: bool = False) -> None:
    path = Path(file)
    if file != "-" and path.exists():
        raise UsageError(
            f"{path} exists and is not overwritten",
            fix="name another file" + (", or give --force" if force_helps else ""),
        )

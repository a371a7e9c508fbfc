"""What the runs of `gradctl explain` mean: whether a second one is needed, and the conclusion. Runs nothing."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gradctl._errors import GradctlError
from gradctl._journal import Run
from gradctl._results import Explanation, Finding
from gradctl._run._launcher import Rank
from gradctl._run._process import take_not_seen

CLEAN, FINDINGS, FAULT, NO_VERDICT = 0, 1, 3, 4

# What the recorder has seen and a tracer can explain, as the sentinel would call it.
_SYMPTOM_OF = {
    "no-gradient": "none",
    "never-reached": "none",
    "unoptimized": "not_in_optimizer",
    "gradients-all-zero": "zero",
    "gradients-zero": "zero",
    "gradients-vanish": "zero",
    "loss-blew-up": "nonfinite",
}
# Of those, what is wrong whatever the program means, where the recorder calls it an error.
_CERTAIN = ("no-gradient", "gradients-all-zero")

_NOTHING = "no verdict: the script has run no backward, so that there is no gradient to judge"
_PERHAPS = ("left_autograd", "live_graphs")


@dataclass(frozen=True, slots=True)
class Options:
    """How to look at a script.

    Args:
        full: trace at once, in the only run.
        steps: end the traced run after so many optimizer steps.
        at_step: the step that matters, counted as the recorder does.
        into: packages to be treated as the user's own code.
        notes: also tell of breaks that do no harm.
        rerun: the script may be run a second time.
        script_to_stderr: what the script prints goes to stderr: stdout is for JSON alone.
    """

    full: bool = False
    steps: int | None = None
    at_step: int | None = None
    into: tuple[str, ...] = ()
    notes: bool = False
    rerun: bool = True
    script_to_stderr: bool = False


@dataclass(frozen=True, slots=True)
class Ran:
    """One run of the script, as it ended.

    Args:
        code: its exit code; negative for a signal.
        told: the result that it left; see `_traced.write`. Empty if it left none.
        seen: symptoms that its journals show.
        names: FQNs of the parameters that its journals name.
        recorded: how many backward passes its main process has journalled.
        children: how many other processes of its own have trained.
        stepping: what its journals show to be wrong with the order of its steps; needs no trace.
        not_seen: why it could not be watched.
        output: the end of what it printed, where that was kept.
    """

    code: int = 0
    told: dict[str, Any] = field(default_factory=dict[str, Any])
    seen: tuple[dict[str, Any], ...] = ()
    names: tuple[str, ...] = ()
    recorded: int = 0
    children: int = 0
    stepping: tuple[Finding, ...] = ()
    not_seen: tuple[str, ...] = ()
    output: str = ""

    @property
    def symptoms(self) -> tuple[dict[str, Any], ...]:
        """What was seen going wrong: by the sentinel, and of what it has not seen by the recorder."""
        found = tuple(self.told.get("symptoms", ()))
        kinds = {symptom["kind"] for symptom in found}
        return (*found, *(symptom for symptom in self.seen if symptom["kind"] not in kinds))

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What the tracer found."""
        return tuple(Finding.from_json(data) for data in self.told.get("findings", ()))

    @property
    def crumbs(self) -> tuple[Finding, ...]:
        """What the sentinel picked up on its way."""
        folder = os.path.dirname(self.told.get("script") or "")
        return tuple(_below(folder, Finding.from_json(data)) for data in self.told.get("crumbs", ()))

    @property
    def faults(self) -> tuple[str, ...]:
        """What failed in gradctl itself."""
        return (*self.told.get("faults", ()), *self.not_seen)

    @property
    def steps(self) -> int:
        """How many optimizer steps were watched."""
        return int(self.told.get("steps", 0))

    @property
    def has_gradients(self) -> bool:
        """Whether there was anything to judge."""
        return bool(self.steps or self.recorded or self.told.get("backwards"))

    @property
    def error(self) -> dict[str, Any] | None:
        """The exception that ended the script."""
        return self.told.get("error")

    @property
    def gradient_error(self) -> bool:
        """Whether that is an error about gradients."""
        noticed = any(symptom["kind"] == "grad_error" for symptom in self.told.get("symptoms", ()))
        return noticed or bool(self.error and self.error["gradient"])


def read_journals(directory: Path, rank: Rank) -> Ran:
    """Return what the recorder has written about a run.

    Args:
        directory: the run directory.
        rank: of several ranks that share it, the one that asks.
    """
    from gradctl._verdict import STEPPING, Facts, judge_facts

    not_seen = unwatched(directory)
    try:
        run = Run.load(directory)
    except GradctlError:
        return Ran(not_seen=not_seen)  # nothing was recorded
    own = tuple(j for j in run.journals if not j.is_child and (rank.launch is None or j.rank == rank.rank))
    facts = Facts(Run(run.directory, own))
    judged = judge_facts(facts).findings if own else ()
    seen = tuple(
        {"kind": _SYMPTOM_OF[f.slug], "text": f.symptom, "step": None, "parameters": list(f.parameters)}
        | ({"certain": True} if f.slug in _CERTAIN and f.severity == "error" else {})
        for f in judged
        if f.slug in _SYMPTOM_OF and f.severity != "note"
    )
    names = dict.fromkeys(n for j in own for record in j.optimizers.values() for n in record.names if n is not None)
    return Ran(
        seen=seen,
        names=tuple(names),
        recorded=sum(j.end.backwards if j.end else len(j.blocks) for j in own),
        children=sum(1 for j in run.children if j.blocks or j.rows),
        stepping=tuple(finding for finding in judged if finding.slug in STEPPING),
        not_seen=not_seen,
    )


def unwatched(directory: Path) -> tuple[str, ...]:
    """Return why the main process of a run could not be watched; empty if it could."""
    return tuple(why for what, why in take_not_seen(directory) if what != "a Python child")


def needs_tracing(first: Ran, options: Options) -> bool:
    """Say whether a second run is needed, and allowed, to come to a conclusion.

    Args:
        first: the run with the sentinel.
        options: how to look.
    """
    asked = (options.notes or options.at_step is not None) and first.error is None and not first.not_seen
    return options.rerun and (is_suspicious(first) or (asked and bool(first.told.get("torch"))))


def is_suspicious(first: Ran) -> bool:
    """Say whether something may be wrong with the gradients of a run, or could not be seen.

    Args:
        first: the run with the sentinel.
    """
    if not first.told.get("torch") or first.not_seen:
        return False  # a second run would see no more
    if first.error is not None and not first.steps and not first.gradient_error:
        return False  # it never came to train: what is missing then is missing for that reason
    return first.gradient_error or bool(first.symptoms or first.told.get("faults"))


def _is_wrong(first: Ran) -> bool:
    """Say whether that much is certain without a trace: a value that left autograd may do no harm."""
    return is_suspicious(first) and (
        first.gradient_error or any(symptom["kind"] not in _PERHAPS for symptom in first.symptoms)
    )


def _is_certain(first: Ran) -> bool:
    """Say whether one run alone proves that something is wrong: an error about gradients, or none reaches anything."""
    return first.gradient_error or any(symptom.get("certain") for symptom in first.seen)


def failed_anew(first: Ran | None, second: Ran) -> bool:
    """Say whether the traced run failed for a reason that the first one did not have, and so shows nothing.

    Args:
        first: the run with the sentinel, if there was one.
        second: the traced run.
    """
    if first is None or second.findings or second.told.get("how") == "done":
        return False
    if second.error is not None:
        return first.error is None or first.error["type"] != second.error["type"]
    return second.code != first.code and second.code != 0


def conclude(script: str, first: Ran | None, second: Ran | None, options: Options) -> Explanation:
    """Return what one or two runs of a script say about its gradients.

    Args:
        script: what it is called.
        first: the run with the sentinel; None if the script was traced at once.
        second: the traced run; None if there was none.
        options: how to look.
    """
    last = second or first or Ran()
    findings, (code, sentence), remarks = _with_stepping(first, _findings(first, second, options), options)
    symptoms = ()
    told_nothing = second is None or failed_anew(first, second)
    unsettled = code == FINDINGS or (code == NO_VERDICT and (told_nothing or last.gradient_error))
    if first is not None and unsettled and _has_trained(first):
        symptoms = tuple(symptom["text"] for symptom in first.symptoms)
    return Explanation(
        script=script,
        exit_code=code,
        sentence=sentence,
        findings=findings,
        symptoms=symptoms,
        remarks=remarks,
        versions=last.told.get("versions") or (first.told.get("versions", {}) if first else {}),
        folder=os.path.dirname(last.told.get("script") or (first.told.get("script") if first else None) or ""),
        names=first.names if first else (),
    )


Conclusion = tuple[int, str]
Said = tuple[tuple[Finding, ...], Conclusion, tuple[str, ...]]


def _has_trained(first: Ran) -> bool:
    return first.gradient_error or first.error is None or first.steps > 0


def _with_stepping(first: Ran | None, said: Said, options: Options) -> Said:
    """Add what the journal of the first run shows of the order of its steps: each is a cause, proven by what was seen.

    Args:
        first: the run with the sentinel, which was recorded; None if there was none.
        said: what is concluded from gradients alone.
        options: how to look.
    """
    findings, (code, sentence), remarks = said
    found = first.stepping if first is not None else ()
    real = tuple(finding for finding in found if finding.severity != "note")
    notes = tuple(finding for finding in found if finding.severity == "note") if options.notes else ()
    findings = (*findings, *real, *notes)
    if not real or code == FAULT:
        return findings, (code, sentence), remarks
    if code == NO_VERDICT:
        error = first.error if first is not None else None
        remarks = (*remarks, sentence if error is None else f"the script itself ended with {_error(error)}")
    causes = sum(1 for finding in findings if finding.severity != "note")
    if code != FINDINGS or sentence.endswith(("cause", "causes")):
        sentence = "1 cause" if causes == 1 else f"{causes} causes"
    return findings, (FINDINGS, sentence), remarks


def _findings(first: Ran | None, second: Ran | None, options: Options) -> Said:
    if second is None:
        assert first is not None
        if _is_wrong(first) and not options.rerun:
            return _from_crumbs(first, "the script was not run a second time (--no-rerun)")
        return (), _of_first(first), ()
    if first is not None and failed_anew(first, second):
        return _from_crumbs(first, f"the traced run {_end(second)}, which the first one did not")
    remarks: tuple[str, ...] = ()
    if first is None and second.told.get("how") == "done":
        remarks = (f"the script was ended{_after(second)}",)
    real = sum(1 for finding in second.findings if finding.severity != "note")
    if not real:
        return second.findings, _of_second(first, second), remarks
    remarks = (*remarks, *(f"the tracer switched itself off: {fault}" for fault in second.faults))
    error = second.error or (first.error if first else None)
    if error is not None and not second.gradient_error and not (first and first.gradient_error):
        remarks = (*remarks, f"the script itself ended with {_error(error)}")
    return second.findings, (FINDINGS, "1 cause" if real == 1 else f"{real} causes"), remarks


def _below(folder: str, finding: Finding) -> Finding:
    """Write the place of a crumb as findings write theirs: relative to the script's folder where it lies below it."""
    place = finding.primary
    if place is None or not folder or not place.file.startswith(folder.rstrip(os.sep) + os.sep):
        return finding
    return replace(finding, primary=replace(place, file=os.path.relpath(place.file, folder)))


def _from_crumbs(first: Ran, why: str) -> Said:
    if first.crumbs and _is_certain(first):
        words = f"{why}: something is wrong, and these lines may have done it; that is no proof"
        return first.crumbs, (FINDINGS, words), ()
    if first.crumbs and (first.symptoms or first.gradient_error):
        return first.crumbs, (NO_VERDICT, f"no verdict: {why}. Symptom seen; these lines may have done it"), ()
    if not first.symptoms and not first.gradient_error:
        return (), _of_first(first), ()
    return (), (NO_VERDICT, f"no verdict: {why}, and one run alone does not show the cause"), ()


def _of_first(first: Ran) -> Conclusion:
    """Conclude from the first run that no cause is to be looked for."""
    if first.not_seen:
        return FAULT, f"gradctl could not watch the script: {first.not_seen[0]}"
    own = _own_end(first)
    if own is not None:
        return own
    if first.told.get("faults"):
        return FAULT, f"gradctl could not watch the script: {first.told['faults'][0]}"
    if not first.has_gradients:
        if first.children:
            return NO_VERDICT, (
                "no verdict: only child processes of the script have trained, and they cannot be traced; "
                "start the ranks with a launcher: torchrun ... -m gradctl explain train.py"
            )
        return NO_VERDICT, _NOTHING
    return CLEAN, f"nothing is wrong with the gradients{_of_steps(first)}"


def _of_second(first: Ran | None, second: Ran) -> Conclusion:
    """Conclude from a traced run that has found no cause."""
    error = second.gradient_error or (first is not None and first.gradient_error)
    if second.faults:
        return FAULT, f"gradctl could not trace the script: {second.faults[0]}"
    if first is not None and first.gradient_error and not second.gradient_error:
        return NO_VERDICT, "no verdict: the error of the first run did not come back in the traced one"
    if error:
        return NO_VERDICT, "no verdict: the cause of this gradient error was not found"
    own = _own_end(second) if second.told.get("how") != "done" else None
    if own is not None:
        return own
    if not second.has_gradients and (first is None or not first.has_gradients):
        return NO_VERDICT, _NOTHING
    return CLEAN, f"nothing is wrong with the gradients{_of_steps(second)}"


def _own_end(ran: Ran) -> Conclusion | None:
    """Conclude from a run that ended for a reason of its own, or never came to anything; None if it did not."""
    if ran.code < 0:
        return NO_VERDICT, f"no verdict: the script {_end(ran)}"
    if ran.error is not None:
        before = "" if ran.told.get("torch") else "; torch was not imported"
        return NO_VERDICT, f"not a gradient problem: {_error(ran.error)}{before}"
    if ran.code:
        return NO_VERDICT, f"not a gradient problem: the script ended itself with exit code {ran.code}"
    if not ran.told:
        return NO_VERDICT, "no verdict: the script ended by os._exit, or became another program, before torch was there"
    if not ran.told.get("torch"):
        return NO_VERDICT, "no verdict: the script never imported torch"
    return None


def _end(ran: Ran) -> str:
    if ran.code < 0:
        try:
            return f"was ended by {signal.Signals(-ran.code).name}"
        except ValueError:
            return f"was ended by signal {-ran.code}"
    if ran.error is not None:
        return f"ended with {_error(ran.error)}"
    return f"ended with exit code {ran.code}"


def _error(error: dict[str, Any]) -> str:
    message = str(error["message"]).partition("\n")[0]
    place = f" ({os.path.basename(error['file'])}:{error['line']})" if error.get("file") else ""
    return f"{error['type']}{': ' if message else ''}{message}{place}"


def _after(ran: Ran) -> str:
    return f" after {ran.steps} step{'' if ran.steps == 1 else 's'}"


def _of_steps(ran: Ran) -> str:
    return "" if not ran.steps else f" of {ran.steps} step{'' if ran.steps == 1 else 's'}"

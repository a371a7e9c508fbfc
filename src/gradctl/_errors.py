"""The error tree.

GradctlError (RuntimeError)          everything that gradctl raises on purpose
  BrokenGradients                    the first steps of a training show an error in its gradients (on request)
  BackwardRefused                    a gradient was asked for while gradients are switched off
  SwitchFailed                       the process-wide switch could not be turned
  TornStep                           a step's forward overlapped a turn of the switch (strict mode)
  NonFiniteGradient                  a NaN or inf gradient, stopped before the update (on request)
  WrongGradient                      a derivative that is not the derivative of what was computed
    BadVjp                           a backward of the caller's that returns the wrong count, shape, dtype or device
  NoSecondDerivative                 an operation on the way has no derivative of its backward
  StaleSource                        what a dropped tensor is made from has changed before backward
  NotPerSample                       the samples of a batch are not independent, so that no gradient belongs to one
  UsageError (also ValueError)       the caller's mistake; the command line exits with 2
    PatternMatchesNothing            a pattern of parameter names that no parameter has
    FreezeRefused                    freezing that would not hold, or would break another wrapper
    BudgetTooSmall                   a byte budget that no plan meets; carries the smallest that one does
    PlanMismatch                     a plan that was made for another model
    PrecisionRefused                 a precision that these parameters, this device or this optimizer cannot have
    UnfinishedStep                   a step asked for, or left, while its microbatches are not all there
    UnknownPolicyKey                 a key of the policy file that gradctl does not know
    RunDirectoryError                a run directory that cannot be made, or holds no run
    BadJournal                       a file that is not a journal

TornStepWarning (UserWarning) says what TornStep would have raised.
"""

from __future__ import annotations


class GradctlError(RuntimeError):
    """An error that says what, why and how to mend it.

    Args:
        headline: one line that names the offender.
        what: what happened, one line.
        why: the reason, one line.
        fix: what to do, one line.
    """

    def __init__(
        self, headline: str, *, what: str | None = None, why: str | None = None, fix: str | None = None
    ) -> None:
        lines = [headline]
        lines += [f"  {label:<5} {text}" for label, text in (("what", what), ("why", why), ("fix", fix)) if text]
        super().__init__("\n".join(lines))
        self.headline = headline
        self.what = what
        self.why = why
        self.fix = fix

    # Tracebacks and reports show the path by which a person imports it; the same for every class of this module.
    __module__ = "gradctl"

    def __init_subclass__(cls) -> None:
        if cls.__module__ == __name__:
            cls.__module__ = "gradctl"

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.headline, self.what, self.why, self.fix)


def _rebuild(kind: type[GradctlError], headline: str, what: str | None, why: str | None, fix: str | None) -> object:
    return kind(headline, what=what, why=why, fix=fix)


class BackwardRefused(GradctlError):
    """A gradient was asked for while gradients are switched off for the process."""


class BrokenGradients(GradctlError):
    """The first steps of a training have shown an error in its gradients; training stopped there, when asked for."""


class SwitchFailed(GradctlError):
    """The process-wide switch could not be turned; nothing was changed."""


class TornStep(GradctlError):
    """A training step's forward overlapped a turn of the switch, so its gradients may be partial."""


class NonFiniteGradient(GradctlError):
    """A gradient is NaN or inf; raised before the update is applied, when asked for."""


class WrongGradient(GradctlError):
    """A derivative that is not the derivative of what was computed."""


class BadVjp(WrongGradient):
    """A backward of the caller's that returns the wrong count, shape, dtype or device; names the argument."""


class NoSecondDerivative(GradctlError):
    """An operation on the way has no derivative of its backward; names the operation and what to use instead."""


class StaleSource(GradctlError):
    """What a dropped tensor is made from has changed between forward and backward; nothing is computed with it."""


class NotPerSample(GradctlError):
    """The samples of a batch are not independent, so that no gradient belongs to one of them; names the module."""


class UsageError(GradctlError, ValueError):
    """The caller's mistake."""


class PatternMatchesNothing(UsageError):
    """A pattern of parameter names that no parameter has; lists near matches."""


class FreezeRefused(UsageError):
    """Freezing that would not hold, or that would break another wrapper; nothing was changed."""


class BudgetTooSmall(UsageError):
    """A byte budget that no plan meets.

    Attributes:
        smallest: the smallest budget that one meets, in bytes; 0 where it is not known.
    """

    smallest: int = 0

    def __reduce__(self) -> tuple[object, ...]:
        return (*super().__reduce__(), {"smallest": self.smallest})


class PlanMismatch(UsageError):
    """A plan that was made for another model; names the first difference. Nothing was changed."""


class PrecisionRefused(UsageError):
    """A precision that these parameters, this device or this optimizer cannot have; nothing was changed."""


class UnfinishedStep(UsageError):
    """A step asked for, or left, while its microbatches are not all there."""


class UnknownPolicyKey(UsageError):
    """A key of the policy file that gradctl does not know, or a value of the wrong type."""


class RunDirectoryError(UsageError):
    """A run directory that cannot be made, or that holds no run."""


class BadJournal(UsageError):
    """A file that is not a journal."""


class TornStepWarning(UserWarning):
    """A training step's forward overlapped a turn of the switch, so its gradients are partial."""

    __module__ = "gradctl"

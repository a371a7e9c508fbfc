"""The next thing to do, for every finding: the one table in which commands are named.

Only what exists may stand here. When a verb lands that does more (`gradctl fit`), its line changes. `{script}` is the
command as it was run, `{step}` the step that matters.
"""

from __future__ import annotations

from gradctl._results import Finding, Severity

FIXES: dict[str, str] = {
    "accumulation": "if that is not meant, look for backward() calls that no optimizer.step() follows",
    "bf16-stall": 'keep float32 master weights: gradctl.precision("bf16-master"), or the weights themselves in float32',
    "clipped-always": "raise the limit, or lower the learning rate and let the clip catch outliers only",
    "data-loader": "DataLoader(num_workers=2, persistent_workers=True), or prepare the data once",
    "dead-gradients": "look at the activations: ReLU or clamp may be saturated, or most of an embedding is not used",
    "gradients-all-zero": "gradctl explain {script}",
    "gradients-zero": "gradctl explain {script}",
    "gradients-vanish": "normalise or add residual connections between these layers, or change their initialisation",
    "late-rank": "look at what rank {rank} does besides training: logging, evaluation, longer batches",
    "learning-rate-zero": "look at the scheduler: its factor is zero, or its step() runs before the first epoch",
    "loss-blew-up": "lower the learning rate, warm it up, or clip: torch.nn.utils.clip_grad_norm_(parameters, 1.0)",
    "loss-flat": "nothing, if this loss need not fall; else overfit one batch, look at labels and learning rate",
    "never-reached": "gradctl explain {script}; if that is meant, freeze them: requires_grad_(False)",
    "no-gradient": "gradctl explain {script}",
    "never-stepped": "call optimizer.step() after backward()",
    "nonfinite-gradient": "gradctl explain --at-step {step} {script}",
    "nonfinite-loss": "gradctl explain --at-step {step} {script}",
    "nonfinite-skipped": "nothing: this is what the loss scaler is for",
    "nonfinite-stopped": "gradctl explain --at-step {step} {script}",
    "nonfinite-weight": "gradctl explain --at-step {step} {script}",
    "no-script": "with gradctl.watch(model, optimizer): around some steps says which line it is",
    "not-seen": "check by hand that weights change from one step to the next",
    "journal-damaged": "nothing to do for the run; keep the file if you report this",
    "journal-newer": "read it with the version that wrote it",
    "ranks-differ": "look for no_sync(), or parameters that the data-parallel wrapper does not hold",
    "rank-steps-differ": "give every rank the same number of batches (DistributedSampler, drop_last=True), or use Join",
    "recorder-fault": "nothing to do for the script; please report it with the journal",
    "saved-by-one": "torch.utils.checkpoint around {where} recomputes it in backward instead of keeping it",
    "skipped-most": "lower GradScaler's init_scale, or train in bfloat16, which needs no scaler",
    "skipped-steps": "look for overflowing activations; bfloat16 needs no scaler",
    "torn-step": "switch gradients off and on between steps only, or use gradctl.off(strict=True)",
    "unoptimized": "gradctl explain {script}; if that is meant, freeze them: requires_grad_(False)",
    "update-too-large": "lower the learning rate, or warm it up",
    "update-too-small": "raise the learning rate",
    "weights-before": "lower the learning rate, or warm it up",
}


def finding(
    slug: str,
    severity: Severity,
    symptom: str,
    why: str,
    *,
    confidence: float = 1.0,
    parameters: tuple[str, ...] = (),
    measured: dict[str, float] | None = None,
    line: str = "",
    **words: str,
) -> Finding:
    """Make a finding with its line of the table.

    Args:
        slug: the cause.
        severity: how bad it is.
        symptom: the claim, with a number.
        why: why it matters.
        confidence: from 0 to 1.
        parameters: those concerned; the first 50 are kept.
        measured: the numbers behind the claim.
        line: which line of the table, where a slug has several.
        words: what the line needs (`script`, `step`, `rank`, `where`).

    Returns:
        The finding.
    """
    fix = FIXES[line or slug]
    for key, value in words.items():
        fix = fix.replace("{" + key + "}", value)
    return Finding(slug, severity, symptom, why, fix, confidence, None, (), parameters[:50], measured)

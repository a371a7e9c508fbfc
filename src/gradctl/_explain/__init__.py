"""Why a gradient is missing, zero, non-finite, stale or overwritten: one rule for each root cause, over the facts."""

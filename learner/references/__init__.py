"""Schedules of the reference model: step -> share of the way towards the policy. Plain numbers."""

from millrace.learner.references.schedules import ema, frozen, snapshot

__all__ = ["ema", "frozen", "snapshot"]

"""Robust accuracy: AutoAttack, its report, and checks against false numbers."""

"""Composed scenes of emoji drawings, questions about them, and evaluation suites."""

"""Composed scenes of real drawings with honest questions, and suites of them."""

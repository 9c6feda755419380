"""Categories of questions about composed scenes, in a module that needs no other."""

from __future__ import annotations

# POPE's splits ask for objects that are not there; the others are MME's pairs of questions.
RANDOM, POPULAR, ADVERSARIAL = "random", "popular", "adversarial"
SPLITS = (RANDOM, POPULAR, ADVERSARIAL)
PAIRS = ("existence", "count", "position", "colour", "OCR")

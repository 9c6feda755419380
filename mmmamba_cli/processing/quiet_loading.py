"""Loading with transformers without what it writes to stderr beside a command's own lines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Turn transformers' progress bars and warnings off.

    The bars draw over those of the command line. The warnings are for those who call transformers:
    of a student's folder they say, for example, that its model_type is not the teacher's.
    """
    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()

"""The name of `mmmamba_cli.inference` up to 0.1, kept for one release."""

from mmmamba_cli.lazy_imports import moved

__getattr__ = moved(__name__, "mmmamba_cli.inference")

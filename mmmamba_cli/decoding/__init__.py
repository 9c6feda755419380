"""Fast decoding: packed or int8 weights, memory that stays in place, one CUDA graph a token."""

from mmmamba_cli.decoding.choosing import Settings
from mmmamba_cli.decoding.generator import Generator
from mmmamba_cli.decoding.int8 import Int8Linear, quantize
from mmmamba_cli.decoding.packing import pack

__all__ = ["Generator", "Int8Linear", "Settings", "pack", "quantize"]

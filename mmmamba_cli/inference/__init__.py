"""Fast decoding: packed or int8 weights, a static cache, and one CUDA graph per token."""

from mmmamba_cli.inference.generator import Generator, make_generator
from mmmamba_cli.inference.quantization import Int8Linear, quantize
from mmmamba_cli.inference.sampling import Settings
from mmmamba_cli.inference.weight_packing import pack

__all__ = ["Generator", "Int8Linear", "Settings", "make_generator", "pack", "quantize"]

"""Invalid images: truncated, empty, huge, animated, of rare modes, or other files."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable

import numpy as np
from mutations import spoil_bytes
from PIL import Image

FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO", "TGA", "PCX")


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def gradient(size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.linear_gradient("L").resize(size).convert("RGB")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, data: bytes, *more: bytes) -> bytes:
    """A PNG with the given header fields."""
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(data))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(more) + body + chunk(b"IEND", b"")


def spoiled(rng: random.Random, done: list[str]) -> bytes:
    form = rng.choice(FORMATS)
    done.append(form)
    return spoil_bytes(rng, encoded(gradient(), form), done, near=200)


def cut(rng: random.Random, done: list[str]) -> bytes:
    form = rng.choice(FORMATS)
    content = encoded(gradient(), form)
    at = rng.randrange(len(content))
    done.append(f"{form} cut at {at} of {len(content)}")
    return content[:at]


def enormous(rng: random.Random, done: list[str]) -> bytes:
    sides = (0, 1, 2, 40, 20_000, 65_535, 2**31 - 1, 2**32 - 1)
    width, height = rng.choice(sides), rng.choice(sides)
    depth, colour = rng.choice(((1, 0), (8, 0), (8, 2), (8, 3), (16, 2), (8, 6), (3, 2), (8, 7)))
    done.append(f"png of {width} x {height}, {depth} bits, colour {colour}")
    return png(width, height, depth, colour, b"\0" * rng.choice((0, 100, 100_000)))


def bomb(rng: random.Random, done: list[str]) -> bytes:
    done.append("much behind little")
    text = chunk(rng.choice((b"zTXt", b"iCCP")), b"a\0\0" + zlib.compress(b"A" * (40 << 20), 1))
    ways = (
        lambda: png(10, 10, 8, 0, b"\0" * (20 << 20)),
        lambda: png(10, 10, 8, 0, b"\0" * 110, text),
        lambda: encoded(Image.new("1", (5000, 5000)), "PNG"),
        lambda: encoded(Image.new("1", (12_000, 12_000)), "PNG", compress_level=1),
    )
    return rng.choice(ways)()


def animated(rng: random.Random, done: list[str]) -> bytes:
    form = rng.choice(("GIF", "PNG", "WEBP", "TIFF"))
    done.append(f"animated {form}")
    frames = [gradient((20 + i, 20)).resize((20, 20)).rotate(i * 9) for i in range(3)]
    return encoded(frames[0], form, save_all=True, append_images=frames[1:])


def odd_mode(rng: random.Random, done: list[str]) -> bytes:
    mode, form = rng.choice(
        (
            ("1", "PNG"),
            ("P", "PNG"),
            ("LA", "PNG"),
            ("RGBA", "PNG"),
            ("I;16", "PNG"),
            ("I", "TIFF"),
            ("F", "TIFF"),
            ("CMYK", "JPEG"),
            ("CMYK", "TIFF"),
            ("L", "GIF"),
            ("YCbCr", "JPEG"),
            ("LAB", "TIFF"),
        )
    )
    size = rng.choice(((1, 1), (1, 300), (300, 1), (7, 7)))
    done.append(f"{mode} {form} {size}")
    return encoded(Image.new(mode, size), form)


def without_range(rng: random.Random, done: list[str]) -> bytes:
    """Images with float or integer values of undefined range."""
    low, high = rng.choice(((0, 1), (0, 255), (-1, 1), (0, 65536), (5, 5), (-1e30, 1e30)))
    values = np.linspace(low, high, 35, dtype="f").reshape(5, 7)
    odd = rng.choice((None, None, np.nan, np.inf, -np.inf))
    if odd is not None:
        values[2, 3] = odd
    done.append(f"values from {low} to {high}, and {odd}")
    if odd is None and rng.random() < 0.4:
        values = np.clip(values, -(2.0**31), 2.0**31 - 256).astype(np.int32)
    return encoded(Image.fromarray(values), "TIFF")


def turned_or_indexed(rng: random.Random, done: list[str]) -> bytes:
    """EXIF rotation, palettes with transparency, frames of different sizes and modes."""
    way = rng.randrange(3)
    done.append(("turned", "indexed", "mixed frames")[way])
    if way == 0:
        exif = Image.Exif()
        exif[0x0112] = rng.choice((0, 1, 6, 8, 99))
        return encoded(gradient(), rng.choice(("JPEG", "PNG", "WEBP")), exif=exif)
    if way == 1:
        image = gradient().quantize(rng.choice((2, 16, 255)))
        transparency = rng.choice((0, b"\0\x80\xff", b"\0" * 255))
        return encoded(image, "PNG", transparency=transparency)
    frames = [Image.new(mode, (9 + i, 9)) for i, mode in enumerate(("1", "RGB", "CMYK", "F"))]
    return encoded(frames[0], "TIFF", save_all=True, append_images=frames[1:])


def something_else(rng: random.Random, done: list[str]) -> bytes:
    done.append("no picture")
    return rng.choice(
        (
            b"",
            b"\0",
            b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
            b"<!DOCTYPE html><html><body>404</body></html>",
            b"%PDF-1.4\n%%EOF",
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run showpage\n",
            b"PK\x03\x04" + bytes(60),
            b"\x89PNG\r\n\x1a\n",
            b"\xff\xd8\xff\xe0",
            b"GIF89a",
            b"BM" + bytes(30),
            b"RIFF\xff\xff\xff\xffWEBPVP8 ",
            b"II*\0\x08\0\0\0\xff\xff" + bytes(20),
            b"P6\n999999999 999999999\n255\n",
            b"P3 1 1 255 " + b"9" * 10_000,
            b"\0\0\x01\0\xff\xff" + bytes(40),
            b"qoif" + struct.pack(">II", 2**31, 2**31) + b"\3\0",
            b"#define im_width 99999999\n#define im_height 99999999\nstatic char im_bits[] = {\n",
        )
    )


KINDS: tuple[Callable[[random.Random, list[str]], bytes], ...] = (
    spoiled,
    cut,
    enormous,
    bomb,
    animated,
    odd_mode,
    without_range,
    turned_or_indexed,
    something_else,
)

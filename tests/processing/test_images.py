"""Opening images: every kind gives the right RGB pixels or a clear error."""

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmmamba_cli.errors import DataError
from mmmamba_cli.processing import image_size, open_image
from mmmamba_cli.processing.images import ImageNote


def noise(mode: str = "RGB", size: tuple[int, int] = (31, 17)) -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    return Image.frombytes(mode, size, pixels.tobytes())


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG header of a large 1-bit image with almost no data."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"\x00") + chunk(b"IEND", b"")


def pixels(image: Image.Image) -> list[list[int]]:
    return np.asarray(image).reshape(-1, 3).tolist()


def test_path_bytes_and_pil_give_the_same_pixels(tmp_path: Path) -> None:
    image = noise()
    file = tmp_path / "picture.png"
    image.save(file)
    for source in (file, str(file), file.read_bytes(), Image.open(file), image):
        opened = open_image(source)
        assert opened.mode == "RGB"
        assert pixels(opened) == pixels(image)


def test_a_pil_image_is_not_modified() -> None:
    image = noise("RGBA")
    before = image.tobytes()
    open_image(image)
    assert (image.mode, image.tobytes()) == ("RGBA", before)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_dropped_not_composited(mode: str) -> None:
    image = noise(mode)
    opaque = image.copy()
    opaque.putalpha(255)
    assert pixels(open_image(encoded(image, "PNG"))) == pixels(opaque.convert("RGB"))


def test_palette_with_transparency() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    data = encoded(image, "PNG", transparency=b"\x00\x80")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pixels(open_image(data)) == [[10, 20, 30], [200, 100, 50]]


def test_one_bit() -> None:
    image = Image.new("1", (2, 1))
    image.putpixel((1, 0), 1)
    assert pixels(open_image(encoded(image, "PNG"))) == [[0, 0, 0], [255, 255, 255]]


def test_cmyk() -> None:
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert pixels(open_image(encoded(image, "TIFF"))) == [[255, 0, 0]] * 64
    red = np.asarray(open_image(encoded(image, "JPEG", quality=100)))
    assert abs(red.astype(int) - [255, 0, 0]).max() <= 2


SIXTEEN = np.array([[0, 128, 129, 32768, 65406, 65407, 65535]], dtype=np.uint16)
EIGHT = [0, 0, 1, 128, 254, 255, 255]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_are_scaled_not_clipped(kind: str) -> None:
    opened = open_image(encoded(Image.fromarray(SIXTEEN), kind))
    assert pixels(opened) == [[value] * 3 for value in EIGHT]


def test_16_bits_of_the_other_byte_order_and_in_a_32_bit_mode() -> None:
    big = Image.frombytes("I;16B", (7, 1), SIXTEEN.astype(">u2").tobytes())
    wide = Image.fromarray(SIXTEEN.astype(np.int32))
    assert wide.mode == "I"
    for image in (big, wide):
        assert pixels(open_image(image)) == [[value] * 3 for value in EIGHT]


@pytest.mark.parametrize(
    ("values", "greys", "said"),
    [
        (
            np.array([[0.0, 0.5, 1.0]], "f"),
            [0, 128, 255],
            "0 to 1 .* 0 is .* black and 1 for white",
        ),
        (np.array([[0.0, 0.25]], "f"), [0, 64], "0 to 0.25 .* 1 for white"),
        (np.array([[0.0, 2.0, 200.4]], "f"), [0, 2, 200], "255 for white"),
        (np.array([[0.0, 257.0, 65535.0]], "f"), [0, 1, 255], "65535 for white"),
        (np.array([[-1.0, 0.0, 1.0]], "f"), [0, 128, 255], "-1 is taken for black and 1 for white"),
        (np.array([[0, 70000]], np.int32), [0, 255], "0 is taken for black and 70000 for white"),
        (np.array([[-1, 5]], np.int32), [0, 255], "-1 is taken for black and 5 for white"),
        (np.array([[-7, -7]], np.int32), [0, 0], "-7 for white"),
        (np.zeros((1, 2), "f"), [0, 0], "1 for white"),
    ],
)
def test_values_without_a_fixed_range_are_scaled_with_a_note(
    values: np.ndarray, greys: list[int], said: str
) -> None:
    for source in (Image.fromarray(values), encoded(Image.fromarray(values), "TIFF")):
        with pytest.warns(ImageNote, match=f"image 3.* has values from .*{said}"):
            opened = open_image(source, label="image 3")
        assert pixels(opened) == [[grey] * 3 for grey in greys]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    values = np.array([[0.0, value]], "f")
    with pytest.raises(
        DataError, match=r"image 3 has values that are not finite numbers \(save it"
    ):
        open_image(Image.fromarray(values), label="image 3")


def test_lab_is_converted_with_a_note(tmp_path: Path) -> None:
    file = tmp_path / "lab.tif"
    # L* of 53, a* of 80, b* of 67: red.
    Image.new("LAB", (2, 1), (round(53.2 * 2.55), 128 + 80, 128 + 67)).save(file)
    with pytest.warns(ImageNote, match=f"image {file} has Lab colours"):
        (red, *_) = pixels(open_image(file))
    assert red[0] > 245 and max(red[1:]) < 20


def test_exif_orientation_is_not_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert open_image(encoded(noise(size=(31, 17)), "JPEG", exif=exif)).size == (31, 17)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF"])
def test_the_first_of_several_frames_is_taken_with_a_note(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "frames"
    first, second = noise(), noise().rotate(180)
    file.write_bytes(encoded(first, kind, save_all=True, append_images=[second]))
    alone = pixels(open_image(encoded(first, kind)))
    with pytest.warns(ImageNote, match=f"image {file} has 2 frames or pages; the first is taken"):
        assert pixels(open_image(file)) == alone
    with pytest.warns(ImageNote, match=r"image 5 \(\d+ bytes\) has 2 frames"):
        assert pixels(open_image(file.read_bytes(), label="image 5")) == alone
    # The caller has chosen the frame of a PIL image.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = Image.open(file)
        assert pixels(open_image(image)) == alone
        image.seek(1)
        assert pixels(open_image(image)) == pixels(image.convert("RGB")) != alone


def test_one_frame_of_an_animated_format_is_a_picture() -> None:
    assert open_image(encoded(noise(), "GIF")).size == (31, 17)


def test_the_previews_of_a_camera_file_are_not_frames() -> None:
    main = Image.new("RGB", (32, 16), (250, 10, 10))
    data = encoded(main, "MPO", save_all=True, append_images=[Image.new("RGB", (4, 4))])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    assert open_image(data).size == (32, 16)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF", "BMP"])
def test_truncated(kind: str, tmp_path: Path) -> None:
    data = encoded(noise(size=(200, 200)), kind)
    file = tmp_path / "cut"
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=f"image {file} is damaged"):
        open_image(file)
    with pytest.raises(DataError, match=r"image 2 \(\d+ bytes\) is damaged"):
        open_image(data[: len(data) // 2], label="image 2")


def test_a_pil_image_over_a_truncated_file() -> None:
    data = encoded(noise(size=(200, 200)), "JPEG")
    with pytest.raises(DataError, match="image 1 is damaged or truncated"):
        open_image(Image.open(io.BytesIO(data[: len(data) // 2])), label="image 1")


@pytest.mark.parametrize("last", [False, True])
def test_damaged_inside(last: bool) -> None:
    data = bytearray(encoded(noise(size=(300, 300)), "PNG"))
    if last:
        # PIL raises another exception for an invalid chunk name.
        data[data.rindex(b"IDAT")] = 0
    else:
        data[data.index(b"IDAT") + 20] ^= 0xFF
    with pytest.raises(DataError, match="damaged"):
        open_image(bytes(data))


@pytest.mark.parametrize("data", [b"", b"not an image", b"\x89PNG\r\n\x1a\n"])
def test_not_an_image(data: bytes, tmp_path: Path) -> None:
    file = tmp_path / "notes.jpg"
    file.write_bytes(data)
    with pytest.raises(DataError, match=f"image {file} is not in an image format"):
        open_image(file)


# PIL warns about the first size and refuses the second.
@pytest.mark.parametrize("side", [10_000, 20_000])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_huge(side: int, tmp_path: Path) -> None:
    file = tmp_path / "bomb.png"
    file.write_bytes(png_header(side, side))
    with pytest.raises(DataError, match=f"image {file} is too large.*scale it down"):
        open_image(file)


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_huge_where_warnings_are_errors() -> None:
    with pytest.raises(DataError, match="too large"):
        open_image(png_header(10_000, 10_000))


def test_the_pixel_limit_is_inclusive_and_holds_for_pil_images() -> None:
    image = noise(size=(10, 10))
    assert open_image(image, max_pixels=100).size == (10, 10)
    with pytest.raises(DataError, match="10 x 10 pixels, at most 99"):
        open_image(image, max_pixels=99)


def test_without_pixels() -> None:
    with pytest.raises(DataError, match="image 1 is empty: 0 x 5"):
        open_image(Image.new("RGB", (0, 5)), label="image 1")


def test_missing_folder_address_and_other_things(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.png does not exist"):
        open_image(tmp_path / "nowhere.png")
    with pytest.raises(DataError, match=f"image {tmp_path} cannot be read"):
        open_image(tmp_path)
    with pytest.raises(DataError, match=r"https://example.com/a.png is an address.*download"):
        open_image("https://example.com/a.png")
    with pytest.raises(DataError, match="image 4 is a dict, expected a path, bytes, a PIL image"):
        open_image({}, label="image 4")  # type: ignore[arg-type]


COLOURS = np.random.default_rng(0).integers(0, 256, (5, 9, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    "values",
    [
        COLOURS,
        COLOURS.transpose(2, 0, 1),
        torch.from_numpy(COLOURS),
        torch.from_numpy(COLOURS).permute(2, 0, 1),
        COLOURS / 255,
        (COLOURS / 255).astype(np.float32),
        torch.from_numpy(COLOURS).permute(2, 0, 1).float() / 255,
        np.dstack([COLOURS, np.full((5, 9), 7, dtype=np.uint8)]),
    ],
    ids=["HWC", "CHW", "tensor HWC", "tensor CHW", "float64", "float32", "tensor float", "RGBA"],
)
def test_arrays_and_tensors_are_pictures(values: np.ndarray | torch.Tensor) -> None:
    before = values.copy() if isinstance(values, np.ndarray) else values.clone()
    image = open_image(values)
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), COLOURS)
    assert image_size(values) == (9, 5)
    assert (values == before).all()


@pytest.mark.parametrize("shape", [(5, 9), (5, 9, 1), (1, 5, 9)])
def test_grey_arrays(shape: tuple[int, ...]) -> None:
    values = COLOURS[:, :, 0].reshape(shape)
    assert np.array_equal(np.asarray(open_image(values))[:, :, 2], COLOURS[:, :, 0])


def test_ambiguous_channels_come_first() -> None:
    """As in transformers' `infer_channel_dimension_format`."""
    values = np.arange(3 * 8 * 3, dtype=np.uint8).reshape(3, 8, 3)
    assert image_size(values) == (3, 8)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (np.zeros((5, 9, 2), dtype=np.uint8), r"shape \(5, 9, 2\), expected \(H, W\), \(H, W, C\)"),
        (np.zeros(9, dtype=np.uint8), r"shape \(9,\)"),
        (np.zeros((0, 9, 3), dtype=np.uint8), "is empty"),
        (np.full((5, 9, 3), 255.0), "values from 255 to 255, expected 0 to 1"),
        (np.full((5, 9, 3), -0.5), "from -0.5 to -0.5"),
        (np.full((5, 9, 3), np.nan), "from nan to nan"),
        (np.zeros((5, 9, 3), dtype=np.int64), "array of int64, expected uint8"),
        (torch.zeros(3, 5, 9, dtype=torch.int32), "array of int32"),
    ],
)
def test_invalid_arrays(values: np.ndarray, problem: str) -> None:
    with pytest.raises(DataError, match=f"image 2.*{problem}"):
        open_image(values, label="image 2")

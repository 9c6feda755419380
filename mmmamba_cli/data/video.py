"""Frames of a sample's videos: picture files, or clips that transformers decodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mmmamba_cli.data.sample import Video, read_image
from mmmamba_cli.errors import DataError
from mmmamba_cli.processing import VideoFrames, open_image


def load_frames(video: Video, decode_clip: Callable[[str], VideoFrames]) -> VideoFrames:
    """The frames of a video; `decode_clip` decodes and samples a clip.

    Raises:
        DataError: a frame cannot be read, or frames have several sizes.
    """
    if video.clip is not None:
        return decode_clip(str(video.clip))
    images = [
        open_image(read_image(frame), label=f"frame {number}", upright=True)
        for number, frame in enumerate(video.frames, start=1)
    ]
    sizes = {image.size for image in images}
    if len(sizes) > 1:
        listed = " and ".join(f"{width} x {height}" for width, height in sorted(sizes)[:2])
        raise DataError(f"the frames of a video have several sizes: {listed}")
    stacked: Any = np.stack([np.asarray(image) for image in images])
    return VideoFrames(stacked, tuple(range(len(images))), video.fps)

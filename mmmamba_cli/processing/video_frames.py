"""Frames of a video for a teacher's own processor, and the decoding of clips by transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
from transformers.video_utils import VideoMetadata, load_video

from mmmamba_cli.errors import DataError

# Decoders that transformers knows, by the package that each imports, best first.
DECODERS = {"torchcodec": "torchcodec", "av": "pyav", "decord": "decord", "cv2": "opencv"}


@dataclass(frozen=True, eq=False)
class VideoFrames:
    """Sampled frames of a video.

    Attributes:
        pixels: (T, H, W, 3) uint8.
        indices: the position of each frame in the video.
        fps: frames in a second of the video; None if it does not say.
        total: number of frames of the video; None for as many as are given.
    """

    pixels: np.ndarray
    indices: tuple[int, ...]
    fps: float | None
    total: int | None = None

    @property
    def key(self) -> tuple[Any, ...]:
        """What its number of tokens depends on: shape, times."""
        return (*self.pixels.shape[:3], self.indices, self.fps, self.total)

    @property
    def metadata(self) -> VideoMetadata:
        """For transformers' video processors."""
        height, width = self.pixels.shape[1:3]
        total = self.total or len(self.indices)
        return VideoMetadata(
            total_num_frames=total,
            fps=self.fps,
            width=width,
            height=height,
            duration=None if self.fps is None else total / self.fps,
            frames_indices=list(self.indices),
        )

    def blank(self) -> VideoFrames:
        """The same video without its pixels."""
        return VideoFrames(np.zeros_like(self.pixels), self.indices, self.fps, self.total)


def decode_clip(path: str, sample: Callable[..., Any]) -> VideoFrames:
    """Decode the frames of a clip that `sample` chooses, given the clip's `VideoMetadata`.

    Raises:
        DataError: no decoder is installed, or the clip cannot be decoded.
    """
    backends = [name for package, name in DECODERS.items() if find_spec(package) is not None]
    if not backends:
        raise DataError(
            f"the video {path} needs a decoder: {' or '.join(DECODERS)}",
            "pip install torchcodec, or give the frames as pictures",
        )
    try:
        pixels, metadata = load_video(path, backend=backends[0], sample_indices_fn=sample)
    except Exception as error:
        # Decoders have exceptions of their own.
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"the video {path} cannot be decoded: {text}") from error
    frames = np.asarray(pixels)
    # Some decoders give (T, 3, H, W).
    if frames.shape[-1] != 3:
        frames = frames.transpose(0, 2, 3, 1)
    indices = tuple(int(index) for index in metadata.frames_indices)
    return VideoFrames(frames, indices, metadata.fps, metadata.total_num_frames)


def sampling_of(video_processor: Any) -> Callable[..., Any]:
    """The rule by which a video processor samples frames, with its own settings."""
    names = video_processor.valid_kwargs.__annotations__
    settings = {name: getattr(video_processor, name, None) for name in names}
    return partial(_sample, video_processor, settings)


def _sample(video_processor: Any, settings: dict[str, Any], metadata: Any, **_: Any) -> Any:
    return video_processor.sample_frames(metadata=metadata, **settings)

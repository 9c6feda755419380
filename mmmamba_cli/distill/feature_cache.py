"""A cache of image features, which several forward passes of a batch share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

# Methods of the base models of transformers that run a tower and its projector.
FEATURE_METHODS = ("get_image_features", "get_video_features")


@contextmanager
def cached_features(base_model: Any, cache: dict[int, tuple[Tensor, Any]]) -> Iterator[None]:
    """Let `base_model` take features from `cache`, and add those that it computes.

    `cache` has pixels and their features by the id of the pixels.
    """
    names = [name for name in FEATURE_METHODS if callable(getattr(base_model, name, None))]
    for name in names:
        setattr(base_model, name, _with_cache(getattr(base_model, name), cache))
    try:
        yield
    finally:
        for name in names:
            delattr(base_model, name)


def _with_cache(compute: Callable[..., Any], cache: dict[int, tuple[Tensor, Any]]) -> Any:
    def features(*args: Any, **kwargs: Any) -> Any:
        named = (value for name, value in kwargs.items() if name.startswith("pixel_values"))
        pixels = args[0] if args else next(named)
        if id(pixels) not in cache:
            cache[id(pixels)] = (pixels, compute(*args, **kwargs))
        return cache[id(pixels)][1]

    return features

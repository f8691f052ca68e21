"""Image features are computed once, behind the same signature."""

import gc
import inspect
from weakref import ref

import pytest
import torch
from torch import Tensor, nn

from grit_core.serving.image_features import METHOD, ImageFeatures


class Seeing(nn.Module):
    """Counts how often it is asked for features."""

    def __init__(self) -> None:
        super().__init__()
        self.num_calls = 0

    def get_image_features(self, pixel_values: Tensor, image_sizes: Tensor | None = None) -> Tensor:
        self.num_calls += 1
        return pixel_values * (1 if image_sizes is None else 2)


@pytest.fixture
def model() -> Seeing:
    return Seeing()


def test_the_signature_that_generate_reads_stays_the_method_s_own(model: Seeing) -> None:
    before = inspect.signature(model.get_image_features)
    ImageFeatures(model, max_bytes=1024)
    assert inspect.signature(getattr(model, METHOD)) == before


def test_features_of_one_key_are_computed_once_and_without_a_key_each_time(model: Seeing) -> None:
    images = ImageFeatures(model, max_bytes=1024)
    pixels = torch.ones(2, 3)
    for _ in range(2):
        with images.of("one"):
            assert torch.equal(model.get_image_features(pixel_values=pixels), pixels)
    assert (model.num_calls, images.hits, images.misses) == (1, 1, 1)
    model.get_image_features(pixels)
    assert model.num_calls == 2


def test_the_least_recently_used_features_make_room(model: Seeing) -> None:
    images = ImageFeatures(model, max_bytes=50)
    for key in ("one", "other", "one"):
        with images.of(key):
            model.get_image_features(torch.ones(2, 4))
    assert model.num_calls == 3
    assert images.num_bytes == 32


def test_a_model_that_is_dropped_is_freed_at_once() -> None:
    """Its memory may be a device's, for which nothing collects garbage."""
    owner = Seeing()
    images = ImageFeatures(owner, max_bytes=1024)
    with images.of("one"):
        owner.get_image_features(torch.ones(2, 4))
    gone = ref(owner)
    gc.disable()
    try:
        del owner
        assert gone() is None
    finally:
        gc.enable()


def test_features_that_were_cleared_are_computed_again(model: Seeing) -> None:
    images = ImageFeatures(model, max_bytes=1024)
    for _ in range(2):
        with images.of("one"):
            model.get_image_features(torch.ones(2, 4))
        images.clear()
    assert (model.num_calls, images.num_bytes) == (2, 0)

"""Levels and numbers are turned into each other without loss, and images are laid in rows."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from models.inference.pixels import UInt8, grid, to_pixels, to_uint8


@given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=4, max_dims=4, max_side=6)))
def test_bytes_to_pixels_and_back_is_the_identity(images: UInt8) -> None:
    """Channels come first and back last, arrays that can't be written are welcome, and no source is shared."""
    images.setflags(write=False)
    pixels = to_pixels(images)
    n, h, w, c = images.shape
    assert pixels.shape == (n, c, h, w)
    assert pixels.is_contiguous()
    np.testing.assert_array_equal(pixels.numpy(), np.moveaxis(images, 3, 1) / np.float32(255))
    before = images.copy()
    np.testing.assert_array_equal(to_uint8(pixels), images)
    pixels.fill_(0)
    np.testing.assert_array_equal(images, before)


def test_every_byte_survives_the_round_trip() -> None:
    """All 256 values, and what lies between two of them goes to the nearer, halves to the even one."""
    every = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    np.testing.assert_array_equal(to_uint8(to_pixels(every)), every)
    between = torch.tensor([0.0, 0.4, 0.6, 1.4, 254.6]).div(255).view(1, 1, 1, 5)
    assert to_uint8(between).ravel().tolist() == [0, 0, 1, 1, 255]
    assert to_uint8(torch.tensor([0.5]).view(1, 1, 1, 1)).item() == 128  # 127.5


@given(
    images=hnp.arrays(np.uint8, st.tuples(*[st.integers(1, 5)] * 3, st.sampled_from([1, 3]))), columns=st.integers(1, 7)
)
def test_a_grid_equals_a_loop(images: UInt8, columns: int) -> None:
    """Images stand in reading order, and places without an image are black."""
    n, h, w, c = images.shape
    rows = -(-n // columns)
    expected = np.zeros((rows * h, columns * w, c), np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * h, index % columns * w
        expected[top : top + h, left : left + w] = image
    np.testing.assert_array_equal(grid(images, columns), expected)

"""The picture as CLIP and SigLIP take it, against Pillow's bicubic filter written out."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_clip import pictures
from torch.testing import assert_close
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

from reward_funcs import _clip, aesthetic_v25


def cubic(x):
    """Keys' kernel with a = -1/2, the one Pillow calls bicubic."""
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def weights(old, new):
    """Matrix (new, old) of the filter: as wide as the scale when it shrinks, so that it smooths; rows sum to 1."""
    matrix = np.zeros((new, old))
    scale = max(old / new, 1.0)
    for row in range(new):
        center = (row + 0.5) * old / new
        first, last = max(int(center - 2 * scale + 0.5), 0), min(int(center + 2 * scale + 0.5), old)
        for column in range(first, last):
            matrix[row, column] = cubic((column + 0.5 - center) / scale)
    return matrix / matrix.sum(axis=1, keepdims=True)


def resize(picture, height, width):
    """(height, width, 3) in 0..255: Pillow filters the rows, rounds to whole grey levels, then the columns."""
    pixels = np.asarray(picture, dtype=float)
    rows = np.einsum("xw,hwc->hxc", weights(pixels.shape[1], width), pixels)
    rows = np.clip(np.floor(rows + 0.5), 0, 255)
    columns = np.einsum("yh,hxc->yxc", weights(pixels.shape[0], height), rows)
    return np.clip(np.floor(columns + 0.5), 0, 255)


def normalise(pixels, mean, std):
    return torch.from_numpy((pixels / 255 - np.array(mean)) / np.array(std)).permute(2, 0, 1).float()


MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@pytest.mark.parametrize(
    ("size", "resized", "corner"),
    [
        ((16, 16), (16, 16), (0, 0)),
        ((40, 40), (16, 16), (0, 0)),
        ((7, 7), (16, 16), (0, 0)),
        ((50, 20), (16, 40), (0, 12)),  # 16 * 50 / 20 = 40 wide; (40 - 16) / 2 = 12
        ((37, 20), (16, 29), (0, 6)),  # 16 * 37 / 20 = 29.6 wide, cut to 29; 6.5 to the even 6
        ((20, 37), (29, 16), (6, 0)),
        ((20, 39), (31, 16), (8, 0)),  # 16 * 39 / 20 = 31.2 high; (31 - 16) / 2 = 7.5, to the even 8
    ],
)
def test_clip_takes_the_middle_square_of_pillows_bicubic(size, resized, corner):
    picture = pictures(1, size)[0]
    top, left = corner
    expected = resize(picture, *resized)[top : top + 16, left : left + 16]
    # A grey level is 1 / 255 / 0.26 = 0.015; Pillow's fixed-point weights may round a half the other way.
    assert_close(_clip.pixel_values(picture, 16), normalise(expected, MEAN, STD), rtol=0, atol=0.016)
    assert (_clip.pixel_values(picture, 16) - normalise(expected, MEAN, STD)).abs().mean() < 1e-4


@pytest.mark.parametrize("size", [(16, 16), (40, 40), (50, 20), (20, 46)])
def test_it_is_transformers_processor_too_where_the_middle_is_whole(size):
    processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    picture = pictures(1, size)[0]
    expected = torch.as_tensor(processor(picture, return_tensors="pt")["pixel_values"][0])
    assert_close(_clip.pixel_values(picture, 16), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(16, 16), (50, 20), (5, 9)])
def test_siglip_takes_the_whole_picture_stretched(size):
    picture = pictures(1, size)[0]
    pixels = aesthetic_v25.pixel_values(picture, 16)
    half = (0.5, 0.5, 0.5)
    assert (pixels - normalise(resize(picture, 16, 16), half, half)).abs().mean() < 1e-4
    processor = SiglipImageProcessorPil(size={"height": 16, "width": 16})
    expected = torch.as_tensor(processor(picture, return_tensors="pt")["pixel_values"][0])
    assert_close(pixels, expected, rtol=0, atol=1e-6)


def test_a_grey_or_transparent_picture_is_read_as_rgb():
    white = [(1 - mean) / std for mean, std in zip(MEAN, STD, strict=True)]
    for mode, color in (("L", 255), ("RGBA", (255, 255, 255, 255))):
        pixels = _clip.pixel_values(Image.new(mode, (20, 30), color), 16)
        assert_close(pixels, torch.tensor(white)[:, None, None].expand(3, 16, 16), rtol=0, atol=1e-6)

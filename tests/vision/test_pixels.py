"""Decoding, squaring and normalising: numbers checked by hand, and every kind of difficult file."""

import io
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from lmkit.errors import BadInput
from lmkit.vision import pixels as module
from lmkit.vision.data import Example
from lmkit.vision.options import Preprocess
from lmkit.vision.pixels import decode, load_pixels, measured, normalize, square


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return Example("some.png", buffer.getvalue(), "a")


def colours(image, channels=3):
    return np.asarray(decode(image, channels)).reshape(-1, channels).tolist()


def test_a_palette_becomes_its_colours():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    assert colours(encoded(image)) == [[10, 20, 30], [200, 100, 50]]


def test_transparent_places_are_white():
    image = Image.new("RGBA", (2, 1), (10, 20, 30, 255))
    image.putpixel((1, 0), (10, 20, 30, 0))
    assert colours(encoded(image)) == [[10, 20, 30], [255, 255, 255]]


def test_sixteen_bits_are_scaled_and_not_cut():
    image = Image.fromarray(np.array([[0, 257, 32896, 65535]], np.uint16))
    assert np.asarray(decode(encoded(image), 1)).tolist() == [[0, 1, 128, 255]]


def test_a_photograph_taken_sideways_is_turned_upright():
    image = Image.fromarray(np.array([[0, 0, 255]], np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held so that the picture must be turned by 90 degrees
    assert decode(encoded(image, exif=exif), 1).size == (1, 3)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "CMYK", "YCbCr"])
def test_other_modes_are_read(mode):
    image = Image.new("RGB", (4, 4), "white").convert(mode)
    kind = "TIFF" if mode in ("CMYK", "YCbCr") else "PNG"
    assert colours(encoded(image, kind))[0] == [255, 255, 255]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "some.png is empty"),
        (b"not an image", "some.png cannot be decoded"),
        (encoded(Image.effect_noise((32, 32), 90)).image[:200], "some.png cannot be decoded"),
    ],
)
def test_a_damaged_image_is_named_or_counted(content, message):
    bad, good = Example("some.png", content, "a"), encoded(Image.new("L", (4, 4), 7))
    with pytest.raises(BadInput, match=message):
        load_pixels([good, bad], Preprocess(size=4))
    pixels, kept, reasons = load_pixels([good, bad, good], Preprocess(size=4), skip_bad=True)
    assert pixels.shape == (2, 3, 4, 4)
    assert kept == [good, good]
    assert len(reasons) == 1
    assert message in reasons[0]


def test_an_empty_file_is_said_to_be_empty(tmp_path):
    (tmp_path / "a.png").touch()
    with pytest.raises(BadInput, match=r"a\.png is empty. Remove it, or set skip_bad"):
        decode(Example(str(tmp_path / "a.png"), tmp_path / "a.png"), 3)


def test_three_ways_to_a_square():
    wide = Image.fromarray(np.array([[0, 100, 200, 250]] * 2, np.uint8))
    assert np.asarray(square(wide, 4, "pad")).tolist() == [[0] * 4, [0, 100, 200, 250], [0, 100, 200, 250], [0] * 4]
    assert np.asarray(square(wide, 2, "crop")).tolist() == [[100, 200]] * 2
    assert np.asarray(square(wide, 4, "stretch")).tolist() == [[0, 100, 200, 250]] * 4


def test_mean_and_deviation_are_those_of_the_pixels():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (7, 3, 6, 6), dtype=torch.uint8, generator=generator)
    found = measured(Preprocess(), pixels)
    floats = pixels.double().transpose(0, 1).reshape(3, -1) / 255
    assert found.mean == pytest.approx(floats.mean(1).tolist(), abs=1e-6)
    assert found.std == pytest.approx(floats.std(1, correction=0).tolist(), abs=1e-6)
    seen = normalize(pixels, found).transpose(0, 1).reshape(3, -1)
    torch.testing.assert_close(seen.mean(1), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(seen.std(1, correction=0), torch.ones(3), atol=1e-4, rtol=0)
    assert measured(Preprocess(mean=[0.5] * 3, std=[0.5] * 3), pixels).mean == [0.5] * 3


def test_half_and_half_sends_black_to_minus_one_and_white_to_one():
    ends = torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1)
    assert normalize(ends, Preprocess(channels=1, mean=[0.5], std=[0.5])).flatten().tolist() == [-1, 1]


def test_too_many_pixels_are_refused_before_any_is_read(monkeypatch):
    monkeypatch.setattr(module, "MAX_BYTES", 100)
    with pytest.raises(BadInput, match=r"2 images of 6 x 6 take .* Lower preprocess.size"):
        load_pixels([Example("a", b""), Example("b", b"")], Preprocess(size=6))


def test_preprocessing_is_kept_with_the_model(tmp_path):
    preprocess = Preprocess(size=9, channels=1, resize="crop", mean=[0.1], std=[0.2])
    preprocess.save(tmp_path)
    assert Preprocess.load(tmp_path) == preprocess
    with pytest.raises(BadInput, match=r"preprocess\.json is missing: without it nobody knows"):
        Preprocess.load(tmp_path / "elsewhere")


def test_no_warning_is_left_to_the_user():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_pixels([encoded(Image.new("RGBA", (3, 2)))], Preprocess(size=4))

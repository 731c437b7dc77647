import io
import struct
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, ImageOps, features

from urae.features.images import MAX_PIXELS, ImageError, decode_image, read_image, read_size

WHITE, RED = (255, 255, 255), (255, 0, 0)


def save(image, path, **options):
    image.save(path, **options)
    return path


def load_image(path):
    return decode_image(read_image(path), path.name)


def pixel(image, at=(0, 0)):
    assert image.mode == "RGB"
    return image.getpixel(at)


@pytest.mark.parametrize("suffix", ["png", "webp", "jpg", "avif"])
def test_every_format_gives_its_colours(tmp_path, suffix):
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    path = save(Image.new("RGB", (32, 16), (200, 100, 50)), tmp_path / f"a.{suffix}")
    assert read_size(path) == (16, 32)
    image = load_image(path)
    assert image.size == (32, 16)
    np.testing.assert_allclose(pixel(image), (200, 100, 50), atol=3)  # lossy formats


def test_content_decides_not_the_suffix(tmp_path):
    path = tmp_path / "a.jpg"
    Image.new("RGB", (4, 4), RED).save(path, format="PNG")
    assert pixel(load_image(path)) == RED


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGBA", (255, 0, 0, 255), RED),
        ("RGBA", (255, 0, 0, 0), WHITE),
        ("RGBA", (255, 0, 0, 102), (255, 153, 153)),
        ("LA", (0, 102), (153, 153, 153)),
        ("L", 77, (77, 77, 77)),
        ("1", 1, WHITE),
    ],
)
def test_modes_of_png(tmp_path, mode, colour, expected):
    assert pixel(load_image(save(Image.new(mode, (4, 4), colour), tmp_path / "a.png"))) == expected


def test_palette_with_transparent_colour_is_white_there(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    loaded = load_image(save(image, tmp_path / "a.png", transparency=1))
    assert (pixel(loaded), pixel(loaded, (1, 0))) == (RED, WHITE)
    loaded = load_image(save(image, tmp_path / "b.png"))
    assert pixel(loaded, (1, 0)) == (0, 0, 255)


def test_sixteen_bit_grey_is_scaled(tmp_path):
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    image = load_image(save(Image.fromarray(values), tmp_path / "a.png"))
    assert [pixel(image, (x, 0))[0] for x in range(4)] == [0, 1, 128, 255]
    path = save(Image.fromarray(values), tmp_path / "b.png", transparency=257)
    assert [pixel(load_image(path), (x, 0))[0] for x in range(4)] == [0, 255, 128, 255]


def test_cmyk_without_profile(tmp_path):
    image = load_image(save(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), tmp_path / "a.jpg"))
    np.testing.assert_allclose(pixel(image), WHITE, atol=2)


def cmyk_profile(lab):
    """Build an ICC profile that gives every mixture of inks one colour, darker with black ink."""
    grid = (bytes(lab) + bytes([0, 128, 128])) * 8
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0])
    lut += struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    lut += bytes(range(256)) * 4 + grid + bytes(range(256)) * 3
    header = struct.pack(">I4sI4s4s4s", 0, b"test", 0x02400000, b"prtr", b"CMYK", b"Lab ")
    header += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061) + bytes(48)
    table = struct.pack(">I4sII", 1, b"A2B0", 144, len(lut))
    profile = header + table + lut
    return struct.pack(">I", len(profile)) + profile[4:]


def test_cmyk_profile_is_converted(tmp_path):
    green = cmyk_profile([128, 64, 192])
    path = save(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), tmp_path / "a.jpg", icc_profile=green)
    red, middle, blue = pixel(load_image(path))
    assert middle > red + 80 and middle > blue + 80


def test_rgb_profile_is_converted_and_a_broken_one_ignored(tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"temp").replace(b"bXYZ", b"rXYZ").replace(b"temp", b"bXYZ")
    image = Image.new("RGB", (8, 8), RED)
    for profile, expected in [(srgb, RED), (swapped, (0, 0, 255)), (b"nonsense", RED)]:
        path = save(image, tmp_path / "a.png", icc_profile=profile)
        np.testing.assert_allclose(pixel(load_image(path)), expected, atol=2)


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (2, 1), RED)
    image.putpixel((1, 0), (0, 0, 255))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # turn by 90 degrees clockwise to view
    path = save(image, tmp_path / "a.png", exif=exif)
    assert read_size(path) == (1, 2)
    turned = load_image(path)
    assert turned.size == (1, 2)
    assert (pixel(turned), pixel(turned, (0, 1))) == (RED, (0, 0, 255))


@pytest.mark.parametrize(
    ("tag", "kind", "count", "payload"),
    [
        (ExifTags.Base.XResolution, 7, 1, b"\x05\0\0\0"),  # bytes for a rational
        (ExifTags.Base.XResolution, 2, 4, b"txt\0"),  # text for a rational
        (ExifTags.Base.Software, 5, 1, struct.pack("<I", 38)),  # a rational, behind, for text
    ],
    ids=["bytes", "text", "rational"],
)
def test_odd_exif_beside_the_orientation_does_not_matter(tmp_path, tag, kind, count, payload):
    """As cameras and editors write it, of another type than the standard says."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    path = save(Image.new("RGB", (16, 8), RED), tmp_path / "a.jpg", exif=exif)
    entries = struct.pack("<HHHII", 2, 0x112, 3, 1, 6)
    entries += struct.pack("<HHI", tag, kind, count) + payload
    tiff = b"II*\0\x08\0\0\0" + entries + b"\0" * 4 + struct.pack("<II", 72, 1)
    odd = b"Exif\0\0" + tiff
    segment = b"\xff\xe1" + struct.pack(">H", len(odd) + 2) + odd
    data = path.read_bytes()
    begin = data.index(b"\xff\xe1")
    length = struct.unpack(">H", data[begin + 2 : begin + 4])[0]
    path.write_bytes(data[:begin] + segment + data[begin + 2 + length :])
    assert load_image(path).size == (8, 16)


def test_every_orientation_is_the_standards(tmp_path):
    image = Image.fromarray(np.arange(18, dtype=np.uint8).reshape(2, 3, 3) * 14)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        path = save(image, tmp_path / "a.png", exif=exif)
        with Image.open(path) as opened:
            wanted = ImageOps.exif_transpose(opened)
        assert np.array_equal(load_image(path), wanted)


def test_a_header_is_enough_for_the_size(tmp_path):
    path = save(Image.effect_noise((640, 480), 64).convert("RGB"), tmp_path / "a.jpg")
    path.write_bytes(path.read_bytes()[:2048])
    assert read_size(path) == (480, 640)
    with pytest.raises(ImageError, match="No such file") as error:
        read_size(tmp_path / "none.jpg")
    assert error.value.reason == "unreachable image"


def test_first_frame_of_an_animation(tmp_path):
    first, second = Image.new("RGB", (4, 4), RED), Image.new("RGB", (4, 4), (0, 0, 255))
    path = tmp_path / "a.webp"
    first.save(path, save_all=True, append_images=[second], lossless=True)
    assert pixel(load_image(path)) == RED


def noise(size=(64, 64)):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "avif"])
@pytest.mark.parametrize("share", [0.02, 0.6])
def test_truncated_is_an_error(tmp_path, suffix, share):
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    path = save(noise(), tmp_path / f"a.{suffix}")
    data = path.read_bytes()
    path.write_bytes(data[: max(16, int(share * len(data)))])
    with pytest.raises(ImageError, match=rf"a\.{suffix} is truncated or corrupt") as caught:
        load_image(path)
    assert caught.value.reason == "truncated image"


@pytest.mark.parametrize("data", [b"", b"GIF89a and so on", b"no image at all"])
def test_no_image_is_an_error(tmp_path, data):
    path = tmp_path / "a.png"
    path.write_bytes(data)
    with pytest.raises(ImageError, match=r"a\.png is not a JPEG, PNG, WebP or AVIF") as caught:
        load_image(path)
    assert caught.value.reason == "unreadable image"
    with pytest.raises(ImageError, match="No such file"):
        load_image(tmp_path / "missing.png")


def png_header(width, height):
    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b""))


def test_bombs_are_refused_by_their_header(tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(100_000, 100_000))
    limit = Image.MAX_IMAGE_PIXELS
    for read in (load_image, read_size):
        with pytest.raises(ImageError, match="100000 x 100000, over the limit of 512") as caught:
            read(path)
        assert caught.value.reason == "decompression bomb"
    path.write_bytes(png_header(20_000, 20_000))
    assert 20_000 * 20_000 < MAX_PIXELS
    assert read_size(path) == (20_000, 20_000)  # twice what Pillow allows by itself
    assert Image.MAX_IMAGE_PIXELS == limit


def test_large_photographs_load():
    stream = io.BytesIO()
    Image.new("L", (15_000, 7_000), 128).save(stream, "JPEG")
    assert decode_image(stream.getvalue(), "a.jpg").size == (15_000, 7_000)

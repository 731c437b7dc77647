"""Image files to 8-bit sRGB pictures: what a viewer would show, or an error with a reason."""

import io
import logging
import struct
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageFile
from PIL.AvifImagePlugin import AvifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

logger = logging.getLogger(__name__)

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".avif"})

MAX_PIXELS = 512_000_000
"""Above this an image counts as a decompression bomb. Pillow itself refuses 179 megapixels, which
ordinary panoramas and medium-format photographs for 4K training exceed."""

Reason = Literal[
    "unreachable image", "unreadable image", "truncated image", "decompression bomb", "too small"
]

# what Pillow's decoders raise on damaged files
_DAMAGE = (
    OSError, SyntaxError, ValueError, LookupError, TypeError, AttributeError, RuntimeError,
    struct.error,
)  # fmt: skip
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""By the EXIF orientation; 1 is upright."""
_SIXTEEN_BITS = 65535


class ImageError(ValueError):
    """An image file that cannot be used, with the kind of reason."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason: Reason = reason


def list_picture_stems(data_dir: Path) -> set[str]:
    """List the stems of a folder's image files, with captions or without."""
    return {path.stem for path in data_dir.iterdir() if path.suffix.lower() in SUFFIXES}


def read_image(path: Path) -> bytes:
    """Read an image file's bytes.

    Raises:
        ImageError: If the system cannot read it.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreachable(path, error) from error


def decode_image(data: bytes, name: str) -> Image.Image:
    """Decode an image file as it is meant to be seen, as 8-bit RGB.

    The EXIF orientation is applied. Transparency (alpha, palette or colour key) is composited on
    white. 16-bit grey is scaled, not clipped. Embedded colour profiles of RGB and CMYK images are
    converted to sRGB; one that cannot be read is ignored, as browsers do. Of an animation the
    first frame counts.

    Args:
        data: Of a JPEG, PNG, WebP or AVIF file, told by its content.
        name: For the messages.

    Raises:
        ImageError: If it is no such file, is damaged or truncated, or has over `MAX_PIXELS`.
    """
    image = _open(io.BytesIO(data), name)
    try:
        return _to_rgb(_turn(image, name), name)
    except _DAMAGE as error:
        raise _damaged(name, error) from error


def read_size(path: Path) -> tuple[int, int]:
    """Read an image's height and width from its header, before any EXIF rotation.

    Raises:
        ImageError: As `decode_image`, but of the pixels nothing is known yet.
    """
    try:
        with path.open("rb") as file:
            image = _open(file, path.name)
            return image.height, image.width
    except OSError as error:
        raise _unreachable(path, error) from error


def _open(file: BinaryIO, name: str) -> ImageFile.ImageFile:
    # The decoder's own class rather than Image.open: its limit of pixels is a global of the process
    decoder = _pick_decoder(file.read(12))
    if decoder is None:
        raise ImageError("unreadable image", f"{name} is not a JPEG, PNG, WebP or AVIF file")
    try:
        file.seek(0)
        image = decoder(file)
    except _DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:  # the system's, not Pillow's
            raise
        raise _damaged(name, error) from error
    if image.width * image.height > MAX_PIXELS:
        raise ImageError(
            "decompression bomb",
            f"{name} is {image.width} x {image.height}, over the limit of "
            f"{MAX_PIXELS / 1e6:.0f} megapixels; make it smaller",
        )
    return image


def _pick_decoder(data: bytes) -> type[ImageFile.ImageFile] | None:
    if data.startswith(b"\xff\xd8\xff"):
        return JpegImageFile
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImageFile
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return WebPImageFile
    if data[4:8] == b"ftyp" and data[8:12] in (b"avif", b"avis", b"mif1", b"msf1"):
        return AvifImageFile
    return None


def _unreachable(path: Path, error: OSError) -> ImageError:
    return ImageError("unreachable image", f"{path.name}: {error.strerror}")


def _damaged(name: str, error: Exception) -> ImageError:
    return ImageError("truncated image", f"{name} is truncated or corrupt: {error}")


def _turn(image: Image.Image, name: str) -> Image.Image:
    """Turn an image as its EXIF says; the rest of it may be of any kind, and is not read."""
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except _DAMAGE as error:
        logger.info("%s: EXIF left out (%s)", name, error)
        return image
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I"):
        image = _scale_to_8_bits(image)
    profile = image.info.get("icc_profile")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
    if profile and image.mode in ("RGB", "CMYK"):
        try:
            return _to_srgb(image, profile)
        except (OSError, ImageCms.PyCMSError) as error:  # damaged, or for another colour space
            logger.info("%s: colour profile left out (%s)", name, error)
    return image.convert("RGB")


def _scale_to_8_bits(image: Image.Image) -> Image.Image:
    grey = np.asarray(image).astype(np.float32)
    if (colour_key := image.info.get("transparency")) is not None:
        grey[grey == colour_key] = _SIXTEEN_BITS
    return Image.fromarray((grey.clip(0, _SIXTEEN_BITS) * (255 / _SIXTEEN_BITS) + 0.5).astype("u1"))


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    srgb = ImageCms.createProfile("sRGB")
    converted = ImageCms.profileToProfile(image, source, srgb, outputMode="RGB")
    assert converted is not None  # only a conversion in place returns nothing
    return converted

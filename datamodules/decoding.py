"""From the content of an image file to pixels, as ``PIL.Image.open(file).convert("RGB")`` has them, but faster.

By simplejpeg, which like PIL uses libjpeg-turbo, but writes RGB straight into one block of memory. torchvision's
decoder was as fast, and is deprecated since 0.29.
"""

from __future__ import annotations

import io

import numpy as np
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

_JPEG = b"\xff\xd8\xff"
# Those of which simplejpeg makes the same pixels as PIL; CMYK is not among them.
_COMMON = ("YCbCr", "Gray", "RGB")


class UndecodableImage(Exception):
    """The content is no image, or a damaged one; the message says what the decoder did."""


def decode(content: bytes) -> Tensor:
    """(3, height, width) uint8, RGB, channels last in memory. EXIF's orientation is left alone, as torchvision does.

    Raises:
        UndecodableImage: no image, or damaged.
    """
    if content.startswith(_JPEG):
        try:
            if simplejpeg.decode_jpeg_header(content)[2] in _COMMON:
                return torch.from_numpy(simplejpeg.decode_jpeg(content)).permute(2, 0, 1)
        except ValueError:
            pass  # PIL says best what is wrong
    return decode_by_pil(content)


def decode_by_pil(content: bytes) -> Tensor:
    """The oracle, and the way for everything that is no JPEG."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except UnidentifiedImageError as error:
        raise UndecodableImage("no image of a known format") from error
    # PIL raises a SyntaxError for a damaged PNG, and DecompressionBombError beyond 179 megapixels.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UndecodableImage(str(error)) from error

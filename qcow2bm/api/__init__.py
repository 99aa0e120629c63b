"""The library's front: open an image, look at its bitmaps, edit them. No rules of its own."""

from qcow2bm.api.bitmap import Bitmap
from qcow2bm.api.edit import Edit
from qcow2bm.api.image import Image, open

__all__ = ["Bitmap", "Edit", "Image", "open"]

"""The public classes and functions for images. The rules they follow are in lower folders."""

from qcow2bm.api.bitmap import Bitmap
from qcow2bm.api.edit import Edit
from qcow2bm.api.image import Image, open

__all__ = ["Bitmap", "Edit", "Image", "open"]

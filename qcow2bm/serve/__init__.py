"""Serving a disk to others while its bitmaps are tracked."""

"""Serving a disk to clients while its bitmaps are tracked."""

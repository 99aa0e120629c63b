"""The fate of bitmaps when the disk goes to another host, and perhaps comes back."""

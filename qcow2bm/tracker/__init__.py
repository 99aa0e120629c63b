"""Recording writes in bitmaps while they happen, and storing the bitmaps piece by piece."""

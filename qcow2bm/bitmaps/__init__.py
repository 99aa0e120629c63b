"""The bitmaps inside an image: their directory, their tables, their bits."""

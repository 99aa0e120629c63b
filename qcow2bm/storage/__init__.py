"""The only place that touches an image file: exact reads and locks, and their memory twin."""

"""A qcow2 file as clusters: header area, refcounts, allocation, and plans of writes and barriers.

Nothing here knows what a bitmap means; that is the business of ``bitmaps/``.
"""

"""Everything that is wrong with an image, refcounts included.

*Spec*: spec/check.md.
"""

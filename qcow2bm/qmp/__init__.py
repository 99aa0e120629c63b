"""Bitmaps of a running QEMU over QMP, and rescuing them around migrations.

*Spec*: spec/rescue.md.
"""

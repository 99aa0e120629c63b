"""Comparing the contents of two disks."""

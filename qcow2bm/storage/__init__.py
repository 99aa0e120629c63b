"""Storages: the only folder that opens, reads, writes and locks image files.

A storage knows bytes and offsets, but nothing of qcow2.
"""

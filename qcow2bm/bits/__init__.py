"""Packed bits, pure: what tables say, how many bits are set, and where.

Bits are packed as on disk: bit ``i`` is bit ``i % 8``, counted from the least significant, of
byte ``i // 8``. ``pure_python`` needs no numpy and serves small inputs; every function in it has a
numpy twin elsewhere in this folder, and a property test that the two agree.
"""

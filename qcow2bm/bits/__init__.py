"""Functions on packed bits and on the entries of bitmap tables. Nothing here reads a file.

Bits are packed as on disk: bit ``i`` is bit ``i % 8`` of byte ``i // 8``, and bit 0 of a byte is
the least significant. The functions in ``pure_python`` need no numpy and serve small inputs. Each
of them has a *twin*, a function elsewhere in this folder that does the same with numpy; property
tests compare the two.
"""

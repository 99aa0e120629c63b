"""Bytes to frozen values and back: the structures of qcow2, declared with construct.

Nothing here reads a file, and construct is imported nowhere else. Every schema is the only
definition of its structure. Parsing judges syntax; what needs the rest of the image to be
judged is left to the layers above.
"""

"""The structures of qcow2, of sidecars and of migration streams: bytes to frozen values and back.

The structures are declared with construct, which no other folder imports. The schema of a structure
is its only definition. No module here reads a file. Parsing judges syntax only; the layers above
judge values that can only be judged with the rest of the image at hand.
"""

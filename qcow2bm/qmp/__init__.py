"""The bitmaps of a running QEMU, over QMP. The public functions are in `qcow2bm.qmp.rescue`.

From the lowest module to the highest:

* `client` sends a command; `answers` reads what QEMU returns for it.
* `actions` and `names`: what can be sent in a transaction, and the names that are used there.
* `machine` has the state of a running QEMU as values; `queries` asks QEMU for the state, and
  `aliases` adds the names that QEMU has for nodes in a migration stream.
* `mapping`, `scratch`, `scratch_image` and `bitmap_copies`: the block-bitmap-mapping, the block
  node that is added for a while, the image that this node can have, and copying bitmaps by it.
* `veto`, `arm`, `verdict` with `settlement`, `copies` and `save` have the functions of one command
  each.

*Spec*: spec/rescue.md.
"""

"""Recording writes in bitmaps while they happen, and storing the bitmaps piece by piece.

The way of a mark to the disk:

1. `Recorder.mark` sets the bit in the `Bits` of the present `Recording`, and touches its piece.
2. `Recording.fan_out` brings touched pieces to every `TrackedBitmap`, if marks go elsewhere.
3. `Batches.due` picks touched pieces; `TrackedBitmap.take` untouches each one, then copies it.
4. `TrackedStore.store` plans the writes: data, refcounts, barrier; new table entries, barrier.
5. `Session.store_pieces` executes the plan; if that fails, it touches the pieces again (INV-META).

Imports go one way: tracker -> edit, handover, flusher -> session -> phase, recorder, fanout.

*Spec*: spec/tracking.md.
"""

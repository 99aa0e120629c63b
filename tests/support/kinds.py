"""The two halves of the table of problem kinds, and the kinds that `fit` repairs."""

from qcow2bm.problem_kinds import KINDS

READ_KINDS = {id: kind for id, kind in KINDS.items() if not kind.needs_check}
CHECKED_KINDS = {id: kind for id, kind in KINDS.items() if kind.needs_check}
FITTABLE = tuple(id for id, kind in KINDS.items() if kind.is_fittable)

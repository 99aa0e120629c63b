"""The output of the commands ``rescue``: for people, and for programs.

*Spec*: spec/rescue.md; spec/json.md, "rescue start", "rescue arm", "rescue verdict" and
"rescue finish".
"""

from __future__ import annotations

from collections.abc import Sequence

from qcow2bm import rescue
from qcow2bm.cli.hints import advise
from qcow2bm.cli.output import Document, as_json, count, head, json_text, quoted, size
from qcow2bm.cli.terminal import print_text
from qcow2bm.units import escape, format_size


def _named(bitmap: rescue.NodeBitmap) -> str:
    return f"{quoted(bitmap.name)} of node {quoted(bitmap.node)}"


def _place(bitmap: rescue.NodeBitmap) -> Document:
    return {"node": bitmap.node, "name": bitmap.name}


# rescue start

_OUTCOMES = {"rescued": "rescued", "copied": "rescued, by a copy", "planned": "would be rescued"}


def print_start(done: rescue.RescueReport, *, dry_run: bool) -> None:
    """Prints what ``rescue start`` did, or would do."""
    for one in done.bitmaps:
        bitmap, outcome = one.bitmap, _OUTCOMES.get(one.outcome, one.outcome)
        proof = f", {size(bitmap.dirty_bytes)} dirty, verified by {one.proof}"
        more = f": {advise(one.reason, one.hint)}" if one.reason else proof if one.proof else ""
        print_text(f"{_named(bitmap)} {outcome}{more}")
    safe = sum(one.is_safe for one in done.bitmaps)
    fate = "would be rescued" if dry_run else "will be stored when the VM quits"
    print_text(f"{safe} of {count(len(done.bitmaps), 'persistent bitmap')} {fate}")
    if safe:
        print_text("(which of them QEMU would have dropped cannot be seen: all are treated alike)")
    if safe < len(done.bitmaps):
        print("the others may be stored or lost")
    if done.migration in ("completed", "failed"):
        print_text(
            f"note: the last migration {done.migration}. If another VM ran on the disks, the "
            "bitmaps may miss what it wrote. Only rescue verdict can tell, on nodes that were armed"
        )


def start_as_json(address: str, done: rescue.RescueReport, *, dry_run: bool) -> Document:
    """The document that ``rescue start`` prints."""
    bitmaps = [
        {
            **_place(one.bitmap),
            "granularity": one.bitmap.granularity,
            "dirty-bytes": one.bitmap.dirty_bytes,
            "outcome": one.outcome,
            "verified-by": one.proof,
            "sha256": one.sha256,
            "reason": advise(one.reason, one.hint) or None,
        }
        for one in done.bitmaps
    ]
    return {
        **head(address, "qmp"),
        "dry-run": dry_run,
        "migration": done.migration or None,
        "bitmaps": bitmaps,
    }


# rescue arm


def print_arm(done: rescue.ArmReport) -> None:
    """Prints what ``rescue arm`` did, and what is still to be done."""
    for node in done.nodes:
        state = "armed" if node.is_new else "was armed already"
        granularity = format_size(node.granularity)
        print_text(f"node {quoted(node.node)} {state}: {escape(node.sentinel)}, {granularity}")
    for bitmap, reason in done.obstacles:
        print_text(f"QEMU will refuse to migrate: {_named(bitmap)} is {reason}")
    for bitmap in done.left_out:
        print_text(f"note: the mapping leaves out {_named(bitmap)}, which stays here")
    if not done.mapping and not done.nodes:
        print("nothing to arm: no node has persistent bitmaps")
    elif done.is_set:
        print_text("the block-bitmap-mapping is set; migrate with the capability dirty-bitmaps")
    else:
        command = {
            "execute": "migrate-set-parameters",
            "arguments": {"block-bitmap-mapping": done.mapping},
        }
        print_text(
            "not armed yet: send this to QEMU and repeat the command, or repeat it with --set"
        )
        print(as_json(command))


def arm_as_json(address: str, done: rescue.ArmReport) -> Document:
    """The document that ``rescue arm`` prints."""
    nodes = [
        {
            "node": node.node,
            "sentinel": node.sentinel,
            "granularity": node.granularity,
            "new": node.is_new,
        }
        for node in done.nodes
    ]
    return {
        **head(address, "qmp"),
        "nodes": nodes,
        "block-bitmap-mapping": done.mapping,
        "set": done.is_set,
        "obstacles": [{**_place(bitmap), "reason": reason} for bitmap, reason in done.obstacles],
        "left-out": [_place(bitmap) for bitmap in done.left_out],
    }


# rescue verdict

_FATES = {"all-dirty": "dirty all over", "in-doubt": "may miss writes"}


def print_verdict(verdict: rescue.Verdict) -> None:
    """Prints the verdict on a node, at once."""
    print(f"node {quoted(verdict.node.name)} {verdict.word}: {verdict.reason}", flush=True)


def print_settlement(done: rescue.Settlement, migration: str) -> None:
    """Prints what became of the bitmaps of a node, and what to do next."""
    verdict = done.verdict
    if done.obstacle:
        print_text(f"  nothing was done: {done.obstacle}")
    for bitmap, fate, reason in done.bitmaps:
        more = f": {reason}" if reason else ""
        print_text(f"  {quoted(bitmap.name)} {_FATES.get(fate, fate)}{more}")
    can_decide = verdict.is_bad and done.is_armed and not done.obstacle
    if can_decide and verdict.concerned:
        print_text(
            "  decide before the VM quits, or these are stored as valid: --remove or --all-dirty"
        )
    elif can_decide:
        print_text("  no bitmap is in doubt: --remove disarms the node")
    if verdict.word == "touched":
        print_text("  what the guest remembers of the disk may be wrong: decide, then shut it down")
    if verdict.word == "untouched" and migration in ("cancelled", "failed") and not done.is_armed:
        print("  now run rescue start")


def print_no_verdict(*, is_unguarded: bool) -> None:
    """Prints that no node is armed; ``is_unguarded``: although a migration completed."""
    if not is_unguarded:
        print("no node is armed")
        return
    print(
        "no node is armed, though the last migration completed\n"
        "rely on what rescue verdict said before. If it said nothing, and another VM ran on the\n"
        "disks, their bitmaps may miss what it wrote: remove them, and take full backups"
    )


def verdicts_as_json(address: str, migration: str, done: Sequence[rescue.Settlement]) -> Document:
    """The document that ``rescue verdict`` prints."""
    nodes = [
        {
            "node": one.verdict.node.name,
            "verdict": one.verdict.word,
            "reason": one.verdict.reason,
            "armed": one.is_armed,
            "obstacle": one.obstacle or None,
            "bitmaps": [
                {"name": bitmap.name, "outcome": fate, "reason": reason or None}
                for bitmap, fate, reason in one.bitmaps
            ],
        }
        for one in done
    ]
    return {**head(address, "qmp"), "migration": migration or None, "nodes": nodes}


# rescue finish


def print_finish(done: Sequence[rescue.CopyRename], *, dry_run: bool) -> None:
    """Prints what became of the copies, or would become of them."""
    if not done:
        print("nothing to finish")
    for one in done:
        renamed = "would be renamed to" if dry_run else "renamed to"
        what = f"left: {one.reason}" if one.reason else f"{renamed} {quoted(one.name)}"
        print_text(f"{quoted(one.copy)} {what}")


def finish_as_json(path: str, done: Sequence[rescue.CopyRename], *, dry_run: bool) -> Document:
    """The document that ``rescue finish`` prints."""
    bitmaps = [
        {
            "copy": json_text(one.copy),
            "name": json_text(one.name),
            "outcome": one.outcome,
            "reason": one.reason or None,
        }
        for one in done
    ]
    return {**head(path), "dry-run": dry_run, "bitmaps": bitmaps}

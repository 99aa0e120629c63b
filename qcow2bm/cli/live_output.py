"""The output of the commands ``live``: for people, and for programs.

*Spec*: spec/live.md; spec/json.md, "live offload", "live restore" and "live status".
"""

from __future__ import annotations

from qcow2bm import live
from qcow2bm.cli.output import (
    Document,
    command_line,
    count,
    head,
    json_text,
    print_facts,
    quoted,
    size,
)
from qcow2bm.cli.terminal import print_text
from qcow2bm.units import format_size


def _restore_command(qmp: str, file: str) -> list[str]:
    return ["qcow2bm", "live", "restore", "--qmp", qmp, file]


def _offload_command(qmp: str, file: str) -> list[str]:
    return ["qcow2bm", "live", "offload", "--qmp", qmp, file]


def _record_command(qmp: str, file: str) -> list[str]:
    return ["qcow2bm", "live", "record", "--qmp", "DESTINATION", "--source", qmp, file]


def _collect_command(qmp: str, file: str) -> list[str]:
    return ["qcow2bm", "live", "collect", "--qmp", qmp, file]


# live offload


def print_taken_out(node: str, name: str) -> None:
    """Prints that a bitmap was taken out."""
    print_text(f"{quoted(name)} of node {quoted(node)} is in the file, and out of the VM")


def print_offload(qmp: str, file: str, done: live.OffloadReport, *, dry_run: bool) -> None:
    """Prints what ``live offload`` did, or would do."""
    bitmaps = done.plan.bitmaps
    for node, bitmap in bitmaps if dry_run else ():
        print_text(f"{quoted(bitmap.name)} of node {quoted(node.name)} would be taken out")
    for left, reason in done.left:
        print_text(f"{quoted(left.name)} of node {quoted(left.node)} stays: {reason}")
    now, before = format_size(done.after), format_size(done.before)
    does = "would then store" if dry_run else "now stores"
    everywhere = "" if done.limited else ", wherever the guest writes"
    former = f"; before this command, {before}{_about(done.seconds)}" if done.before else ""
    print_text(
        f"a stop {does} at most {now} of bits{everywhere}{_about(done.stop_seconds)}{former}"
    )
    if done.limited and not done.limited.fits:
        print_text(_too_long(qmp, file, done.limited))
    if not dry_run and any(node.recorder_granularity for node in done.plan.nodes):
        print_text(
            "exact: during a migration without the capability dirty-bitmaps, run "
            f"{command_line(_record_command(qmp, file))}; after it, before the source ends, run "
            f"{command_line(_collect_command(qmp, file))}"
        )
    if not done.tails_travel:
        print_text(
            "note: a block-bitmap-mapping is set, so the tail does not travel in a migration with "
            "the capability dirty-bitmaps; if the storage is not shared, the bitmaps are lost then"
        )
    if not dry_run:
        command = command_line(_restore_command(qmp, file))
        print_text(
            f"to put {count(len(bitmaps), 'bitmap')} back, run this with the socket of the VM that "
            f"has the disks then: {command}"
        )


def _too_long(qmp: str, file: str, limited: live.Limited) -> str:
    """Says that a stop takes too long, and what to do about it."""
    text = "warning: this is longer than --max-downtime"
    if not limited.rounds:
        return (
            f"{text}: what is left takes so long by the time that QEMU took for the copies; small "
            "copies make the estimate rough: run the command again, or allow more time"
        )
    text += f", although new tails followed {count(limited.rounds, 'time')}: "
    granularity = limited.fitting_granularity
    if granularity is None:
        return text + "the guest writes too widely, or other bitmaps take too long; no tail fits"
    return text + (
        f"the guest writes too widely; a tail granularity of {format_size(granularity)} fits: put "
        f"the bitmaps back ({command_line(_restore_command(qmp, file))}), remove the file, and "
        f"begin again with --tail-granularity {granularity}"
    )


def _about(seconds: float | None) -> str:
    """A time, as it follows an amount of bits."""
    return "" if seconds is None else f", in about {_milliseconds(seconds)} ms"


def _milliseconds(seconds: float) -> str:
    number = 1000 * seconds
    return f"{number:.0f}" if number >= 10 else f"{number:.2g}"


def offload_as_json(qmp: str, file: str, done: live.OffloadReport, *, dry_run: bool) -> Document:
    """The document that ``live offload`` prints."""
    return {
        **head(qmp, "qmp"),
        "filename": json_text(file),
        "dry-run": dry_run,
        "tail-granularity": done.plan.tail_granularity,
        "stop-bytes-before": done.before,
        "stop-bytes": done.after,
        "stop-seconds-before": done.seconds,
        "stop-seconds": done.stop_seconds,
        "tails-travel": done.tails_travel,
        "exact": any(node.recorder_granularity for node in done.plan.nodes),
        "limit": done.limited
        and {
            "fits": done.limited.fits,
            "rounds": done.limited.rounds,
            "fitting-granularity": done.limited.fitting_granularity,
        },
        "bitmaps": [
            {
                "node": node.name,
                "name": json_text(bitmap.name),
                "granularity": bitmap.granularity,
                "enabled": bitmap.enabled,
            }
            for node, bitmap in done.plan.bitmaps
        ],
        "left": [
            {"node": bitmap.node, "name": json_text(bitmap.name), "reason": reason}
            for bitmap, reason in done.left
        ],
    }


# live restore

_OUTCOMES = {
    "restored": "is back, with every write",
    "kept": "is as it was",
    "left": "is not put back",
    "lost": "is lost",
}


def print_restore(done: live.RestoreReport) -> None:
    """Prints what ``live restore`` did."""
    for one in done.bitmaps:
        more = f": {one.reason}" if one.reason else _precision(one.written)
        place = f"{quoted(one.name)} of node {quoted(one.node)}"
        print_text(f"{place} {_OUTCOMES[one.outcome]}{more}")


def _precision(written: live.WrittenFacts | None) -> str:
    if not written or not written.dirty_bytes:
        return ""
    marked = format_size(written.dirty_bytes)
    if written.is_exact:
        return f" and no more: {marked} were written since the offload"
    reason = f", because {written.reason}" if written.reason else ""
    return f"; the tail marks {marked} as written since the offload, which may be too much{reason}"


def restore_as_json(subject: str, kind: str, file: str, done: live.RestoreReport) -> Document:
    """The document that ``live restore`` prints; ``kind`` says what the ``subject`` is."""
    return {
        **head(file),
        "qmp": json_text(subject) if kind == "qmp" else None,
        "image": json_text(subject) if kind == "image" else None,
        "bitmaps": [
            {
                "node": one.node,
                "name": json_text(one.name),
                "outcome": one.outcome,
                "reason": one.reason or None,
                "written": one.written
                and {
                    "exact": one.written.is_exact,
                    "dirty-bytes": one.written.dirty_bytes,
                    "reason": one.written.reason or None,
                },
            }
            for one in done.bitmaps
        ],
    }


# live record and live collect


def print_recorders(recorders: tuple[live.RecorderFacts, ...]) -> None:
    """Prints the recorders that a machine has."""
    for node, granularity, dirty_bytes in recorders:
        print_text(
            f"recorder of node {quoted(node)}: granularity {format_size(granularity)}, "
            f"{format_size(dirty_bytes)} recorded"
        )


def recorders_as_json(qmp: str, file: str, recorders: tuple[live.RecorderFacts, ...]) -> Document:
    """The document that ``live record`` and ``live collect`` print."""
    return {
        **head(qmp, "qmp"),
        "filename": json_text(file),
        "recorders": [
            {"node": node, "granularity": granularity, "dirty-bytes": dirty_bytes}
            for node, granularity, dirty_bytes in recorders
        ],
    }


# live status

_STEPS = {
    "planned": "nothing was done",
    "begun": "an offload or a restore was interrupted",
    "offloaded": "the bitmaps are in the file",
    "restored": "the bitmaps were put back",
    "no-tail": "the machine has bitmaps of these names, and no tail of this file",
    "away": "cannot be put back here now",
    "in-doubt": "in doubt",
}


def is_bad(found: live.LiveStatus) -> bool:
    """Whether a bitmap of the file is lost or in doubt."""
    return any(
        node.step == "in-doubt" or any(bitmap.where == "lost" for bitmap in node.bitmaps)
        for node in found.nodes
    )


def _next(qmp: str, file: str | None, found: live.LiveStatus) -> list[list[str]]:
    """The commands that can follow, the one that goes on first."""
    steps = {node.step for node in found.nodes}
    if file is not None and found.can_collect:
        return [_collect_command(qmp, file)]
    if file is None or "in-doubt" in steps:
        return []
    going_on, back = _offload_command(qmp, file), _restore_command(qmp, file)
    if steps & {"planned", "begun"}:
        return [going_on, back]
    return [back] if "offloaded" in steps else []


def print_status(qmp: str, file: str | None, found: live.LiveStatus) -> None:
    """Prints what ``live status`` found."""
    print_facts(
        [
            ("VM", found.machine),
            ("last migration", found.migration or "none"),
            ("a stop stores", f"at most {size(found.stop_bytes)} of bits"),
        ]
    )
    for bitmap, stop_bytes in found.bitmaps:
        print(f"\nbitmap {quoted(bitmap.name)} of node {quoted(bitmap.node)}")
        state = bitmap.why_unusable or ("recording" if bitmap.is_recording else "disabled")
        stored = f", {format_size(stop_bytes)} at a stop" if bitmap.is_persistent else ""
        print_facts(
            [
                ("state", f"{state}, {'persistent' if bitmap.is_persistent else 'transient'}"),
                ("granularity", size(bitmap.granularity)),
                ("dirty", f"{size(bitmap.dirty_bytes)}{stored}"),
            ],
            indent="  ",
        )
    for node in found.nodes:
        reason = f": {node.reason}" if node.reason else ""
        print()
        print_text(f"offload of node {quoted(node.node)}: {_STEPS[node.step]}{reason}")
        for offloaded in node.bitmaps:
            print_text(f"  {quoted(offloaded.name)}: {_WHERE[offloaded.where]}")
    steps = {node.step for node in found.nodes}
    first = "stop or migrate the VM; then, with the socket of the VM that has the disks, "
    for command in _next(qmp, file, found):
        print_text(f"next: {first if steps == {'offloaded'} else ''}{command_line(command)}")
    if file is not None and steps == {"restored"}:
        print_text(f"next: remove {quoted(file)}, which is not needed any more")


_WHERE = {
    "machine": "in the VM",
    "file": "in the file",
    "elsewhere": "in another VM, or in the image",
    "lost": "lost",
}


def status_as_json(qmp: str, file: str | None, found: live.LiveStatus) -> Document:
    """The document that ``live status`` prints."""
    return {
        **head(qmp, "qmp"),
        "filename": None if file is None else json_text(file),
        "status": found.machine,
        "migration": found.migration or None,
        "stop-bytes": found.stop_bytes,
        "bitmaps": [
            {
                "node": bitmap.node,
                "name": json_text(bitmap.name),
                "granularity": bitmap.granularity,
                "dirty-bytes": bitmap.dirty_bytes,
                "recording": bitmap.is_recording,
                "persistent": bitmap.is_persistent,
                "busy": bitmap.is_busy,
                "inconsistent": bitmap.is_inconsistent,
                "stop-bytes": stop_bytes,
            }
            for bitmap, stop_bytes in found.bitmaps
        ],
        "nodes": [
            {
                "node": node.node,
                "step": node.step,
                "reason": node.reason or None,
                "bitmaps": [
                    {"name": json_text(one.name), "where": one.where} for one in node.bitmaps
                ],
            }
            for node in found.nodes
        ],
        "next": [list(map(json_text, command)) for command in _next(qmp, file, found)],
    }


# live remove


def removed_as_json(qmp: str, bitmaps: tuple[live.NodeBitmap, ...]) -> Document:
    """The document that ``live remove`` prints."""
    return {
        **head(qmp, "qmp"),
        "removed": [{"node": b.node, "name": json_text(b.name)} for b in bitmaps],
    }

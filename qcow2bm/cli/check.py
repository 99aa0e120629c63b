"""The command ``check``: everything that is wrong with an image, and what it means.

*Spec*: spec/check.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from qcow2bm import Check, Image, Problem, open
from qcow2bm import problems as structures
from qcow2bm.cli import output
from qcow2bm.cli.advice import advise
from qcow2bm.cli.arguments import (
    OutputArguments,
    ReadingArguments,
    add_image,
    add_output,
    add_reading,
)
from qcow2bm.cli.messages import about
from qcow2bm.cli.next_command import Advice, print_advice
from qcow2bm.cli.output import Document, count, quoted
from qcow2bm.cli.parser import Parser
from qcow2bm.cli.terminal import paint, print_text
from qcow2bm.units import format_size

ERRORS, LEAKS = 2, 3

_EPILOG = """\
All references to clusters are followed and compared with the refcounts, as qemu-img check does it,
even if QEMU refuses to open the image. Nothing is changed.

exit status: 0 all is well; 1 the image could not be checked; 2 there are errors; 3 there are leaked
clusters, and no errors; 64 wrong usage
"""


_LEADING = (
    *(structures.L1_TABLE, structures.L2_TABLE, structures.SNAPSHOT_TABLE),
    *(structures.DIRECTORY, structures.ENTRY, structures.TABLE),
)
"""The structures that lead to clusters."""

_MOST_ALIKE = 3
"""How many problems of one kind are listed without --all."""


class Arguments(OutputArguments, ReadingArguments):
    """The values of the arguments of ``check``."""

    image: str
    all: bool


def define(parser: Parser) -> None:
    """Adds the arguments."""
    parser.namespace = Arguments
    parser.examples = ("qcow2bm check vm.qcow2", "qcow2bm check -U --json vm.qcow2")
    parser.epilog = _EPILOG
    add_image(parser)
    parser.add_argument(
        "--all",
        action="store_true",
        help="list every problem, also those that follow from others",
    )
    add_output(parser)
    add_reading(parser)


def run(arguments: Arguments) -> int:
    """Checks an image and prints what it finds; returns the exit status."""
    with (
        about(arguments.image),
        open(arguments.image, force_share=arguments.force_share) as image,
    ):
        checked = image.check()
        problems = (*image.problems, *checked.problems)
        advice = advise(image, arguments.image, problems)
        if arguments.output == "json":
            output.print_json(_document(image, problems, checked.leaked_clusters, advice))
        else:
            _print(image, problems, checked, is_all=arguments.all)
            output.print_refusal(problems)
            print_advice(advice)
    return _status(problems)


def _status(problems: Iterable[Problem]) -> int:
    severities = {found.severity for found in problems}
    if severities & {"refused", "unusable"}:
        return ERRORS
    return LEAKS if "leak" in severities else 0


def _document(
    image: Image, problems: Sequence[Problem], leaked_clusters: int, advice: Advice
) -> Document:
    return {
        **output.head(image.name),
        "problems": [
            {
                **output.problem_as_json(image, found),
                "meaning": found.meaning,
                "qemu-message": found.qemu_message,
                "repairs": [found.repair] if found.repair else [],
            }
            for found in problems
        ],
        "leaked-clusters": leaked_clusters,
        "next": advice.as_json,
    }


def _print(image: Image, problems: Sequence[Problem], checked: Check, *, is_all: bool) -> None:
    following = [] if is_all else _following(image, problems)
    alike: dict[str, list[Problem]] = {}
    for found in problems:
        if found not in following:
            alike.setdefault(found.id, []).append(found)
    for group in alike.values():
        _print_alike(image, group, len(group) if is_all else _MOST_ALIKE)
    if following:
        kinds = Counter(found.id for found in following)
        listed = ", ".join(f"{number} {id}" for id, number in kinds.items())
        more = f"{count(len(following), 'more problem')} of clusters"
        print_text(f"{more}, which may follow from these: {listed} (--all lists them)")
    if problems:
        print()
    if checked.leaked_clusters:
        size = format_size(checked.leaked_clusters * image.cluster_size)
        print(f"{count(checked.leaked_clusters, 'cluster')} leaked: {size}")
    errors = sum(found.severity in ("refused", "unusable") for found in problems)
    print(count(errors, "error") if errors else "no errors")


def _print_alike(image: Image, alike: Sequence[Problem], most: int) -> None:
    """Prints problems of one kind, and explains the kind once."""
    for found in alike[:most]:
        name = output.owner_of(image, found)
        label = "" if name is None else f"bitmap {quoted(name)}: "
        print_text(f"{paint(found.severity, found.severity)}: {label}{found.message}")
    if len(alike) > most:
        print_text(f"    and {len(alike) - most} more like these (--all lists them)")
    kind = alike[0]
    if kind.qemu_message:
        print_text(f'    QEMU says "{kind.qemu_message}"')
    output.print_wrapped(kind.meaning, indent="    ")
    print_text(f"    ({kind.id})")


def _following(image: Image, problems: Sequence[Problem]) -> list[Problem]:
    """Returns the problems of refcounts that may be there because of other problems.

    If a table is damaged, what it leads to was not counted, and seems to leak. If two structures
    use the same cluster, its refcount cannot be right for both.
    """
    size = image.cluster_size
    shared = {found.offset // size for found in problems if found.kind.is_overlap}
    is_cut = any(found.is_fault and found.structure in _LEADING for found in problems)
    return [
        found
        for found in problems
        if found.structure == structures.CLUSTER
        and not found.kind.stands_for_more
        and (found.offset // size in shared or (is_cut and found.severity == "leak"))
    ]

"""New images of every cluster size and refcount width."""

from __future__ import annotations

import pytest
from support.audit import Audit

import qcow2bm
from qcow2bm import FormatError, LimitError, build_empty_image


@pytest.mark.parametrize("refcount_bits", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("cluster_size", [512, 4096, 1 << 16])
@pytest.mark.parametrize("size", [512, 64 << 20, (1 << 30) + 512])
def test_every_cluster_of_a_new_image_is_counted_once(
    size: int, cluster_size: int, refcount_bits: int
) -> None:
    new = build_empty_image(size, cluster_size, refcount_bits)
    audit = Audit(new.head.ljust(new.length, b"\0"))
    assert audit.size == size
    assert audit.cluster_size == cluster_size
    assert 1 << audit.order == refcount_bits
    assert audit.refcounts == audit.references
    assert len(audit.refcounts) * cluster_size == new.length


def test_the_default_is_a_cluster_size_for_which_the_l1_table_is_small_enough() -> None:
    for size, cluster_size in ((2 << 50, 64 << 10), ((2 << 50) + 512, 2 << 20)):
        with qcow2bm.open(build_empty_image(size).head) as image:
            assert image.cluster_size == cluster_size


@pytest.mark.parametrize(
    ("arguments", "error", "reason"),
    [
        ((1 << 40, 512), LimitError, "the size of the L1 table"),
        ((1 << 62,), LimitError, "the size of the L1 table"),
        ((1 << 30, 1000), ValueError, "cluster_size is 1000"),
        ((1 << 30, 256), ValueError, "cluster_size is 256"),
        ((1 << 30, 4 << 20), ValueError, "cluster_size is 4194304"),
        ((1 << 30, 0), ValueError, "cluster_size is 0"),
        ((1 << 30, 4096, 3), ValueError, "refcount_bits is 3"),
        ((1 << 30, 4096, 128), ValueError, "refcount_bits is 128"),
        ((-512,), FormatError, "size"),
    ],
)
def test_an_image_that_cannot_be_is_refused(
    arguments: tuple[int, ...], error: type[Exception], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        build_empty_image(*arguments)

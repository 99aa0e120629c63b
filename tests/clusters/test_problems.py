"""Problems of the header say what is wrong, for any values in the image."""

from __future__ import annotations

import pytest
from support.images import Stored, build_image, extension
from support.scripted_storage import ScriptedStorage

from qcow2bm.clusters.file import ClusterFile
from qcow2bm.clusters.problems import header_problems
from qcow2bm.format.extensions import FEATURE_NAMES
from qcow2bm.format.features import KINDS, FeatureName, FeatureNames, build_feature_names

NAMES = {
    b"fast": "40 (fast)",
    b"": "40",
    b"\x1b[31m\nred": r"40 (\x1b[31m\nred)",
    b"\xff\xfe": r"40 (\xff\xfe)",
    "\u202egr\u00f6\u00dfe\u2028".encode(): r"40 (\u202egröße\u2028)",
    b"\x9b" * 46: "40 (" + r"\x9b" * 46 + ")",
}


@pytest.mark.parametrize("kind", ["incompatible", "autoclear"])
@pytest.mark.parametrize("name", NAMES)
def test_names_of_features_are_printable(kind: str, name: bytes) -> None:
    table = FeatureNames((FeatureName(KINDS.index(kind), 40, name.ljust(46, b"\0")),))
    image = build_image(
        Stored(),
        extensions=[extension(FEATURE_NAMES, build_feature_names(table))],
        header={f"{kind}_features": 1 << 40 | (kind == "autoclear")},
    )
    (found,) = header_problems(ClusterFile(ScriptedStorage(image.data), force_share=False))
    assert found.id == f"header.{kind}_features.unknown"
    assert found.message.isprintable()
    assert f"has unknown bits set: {NAMES[name]}" in found.message

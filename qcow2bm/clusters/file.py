"""An open qcow2 file: its header, its header extensions, and reads within its bounds.

The structures that the header leads to are listed in ``layout``.

*Spec*: spec/header.md.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cached_property

from qcow2bm.errors import ChangedWhileReadingError, FormatError, LimitError, StateError
from qcow2bm.format import extensions, features
from qcow2bm.format.extensions import Generation, HeaderExtension
from qcow2bm.format.features import AUTOCLEAR_GENERATION, KNOWN_AUTOCLEAR, Feature, FeatureNames
from qcow2bm.format.header import FIELD_OFFSETS, MAGIC, V3_LENGTH, parse_header
from qcow2bm.storage.interface import Storage, as_sparse, read_bytes, read_exactly
from qcow2bm.units import align_up

MIN_CLUSTER_BITS = 9
MAX_CLUSTER_BITS = 21


class ClusterFile:
    """The header area of an image, read once, and reads from anywhere in the file.

    Attributes:
        storage: the storage of the image.
        header: the fixed fields of the header.
        area: the header extensions.
        extensions_offset: the host offset of the header extensions.
        cluster_size: the size of a cluster in bytes.
        virtual_size: the size of the disk in bytes, rounded down to whole sectors as in QEMU.
        file_size: the size of the image file in bytes when it was opened.
    """

    def __init__(self, storage: Storage, *, force_share: bool) -> None:
        """Reads the header area; the caller holds the read lock of ``storage``.

        With ``force_share``, `lock` takes no lock.

        Raises:
            FormatError: the file has no qcow2 header, or its cluster size is out of range.
            UnsupportedError: the version of qcow2 is unknown.
            StorageError: reading failed.
        """
        self.storage = storage
        self._holes = as_sparse(storage)
        self._force_share = force_share
        self._is_closed = False
        self._token = storage.change_token()
        self.file_size = storage.size()
        start = read_bytes(storage, 0, min(self.file_size, 1 << MIN_CLUSTER_BITS))
        if start and not start.startswith(MAGIC):
            raise self._error_of_other_format()
        self.header = parse_header(start)
        if not MIN_CLUSTER_BITS <= self.header.cluster_bits <= MAX_CLUSTER_BITS:
            raise FormatError(
                "header",
                "cluster_bits",
                FIELD_OFFSETS["cluster_bits"],
                f"is {self.header.cluster_bits}, must be {MIN_CLUSTER_BITS} to {MAX_CLUSTER_BITS}",
            )
        self.cluster_size = self.header.cluster_size
        cluster = self.read(0, self.cluster_size)
        self.header = parse_header(cluster)
        self.virtual_size = self.header.size & ~511
        self.extensions_offset, data = self._extension_area(cluster)
        self.area = extensions.parse_extensions(data, self.extensions_offset)
        self._seen = cluster[: self._used_length()]

    def _error_of_other_format(self) -> FormatError:
        from qcow2bm.format import other_formats  # which sound images do not need

        size = self.file_size
        head = read_bytes(self.storage, 0, min(size, other_formats.HEAD_BYTES))
        tail_bytes = min(size, other_formats.TAIL_BYTES)
        tail = read_bytes(self.storage, size - tail_bytes, tail_bytes)
        return other_formats.not_qcow2(head, tail, size)

    def _extension_area(self, cluster: bytes) -> tuple[int, bytes]:
        start = self.header.header_length
        if not self.has_extension_area:
            return start, b""
        end = self.header.backing_file_offset
        return start, cluster[start : end if 0 < end <= self.cluster_size else None]

    @property
    def has_extension_area(self) -> bool:
        """Whether the place of the header extensions is known: ``header_length`` is in range."""
        header = self.header
        return header.version == 2 or V3_LENGTH <= header.header_length <= self.cluster_size

    @property
    def extensions_end(self) -> int:
        """The host offset behind the last header extension, which is that of the end marker."""
        return self.extensions_offset + sum(e.size for e in self.area.extensions)

    def _used_length(self) -> int:
        end = self.extensions_end + 8  # the end marker
        header = self.header
        if header.backing_file_offset <= self.cluster_size:
            end = max(end, header.backing_file_offset + header.backing_file_size)
        return end

    @property
    def used_header(self) -> bytes:
        """The bytes of the header, the header extensions and the backing file name, as read."""
        return self._seen

    @cached_property
    def feature_names(self) -> FeatureNames:
        """The feature name table of the image; empty if the image has none."""
        found = self.find(extensions.FEATURE_NAMES)
        return features.parse_feature_names(found.data) if found else FeatureNames()

    def features(self, kind: str) -> tuple[Feature, ...]:
        """Returns the feature bits that are set; ``kind`` is one of `format.features.KINDS`."""
        if kind not in features.KINDS:
            raise ValueError(f"kind is {kind!r}, must be one of {features.KINDS}")
        mask: int = getattr(self.header, f"{kind}_features")
        return features.features(kind, mask, self.feature_names)

    @cached_property
    def generation(self) -> Generation | None:
        """The generation, which identifies the last writer; None if the image records none.

        *Spec*: spec/lifecycle.md, "Generation".
        """
        found = self.find(extensions.GENERATION)
        is_set = self.header.autoclear_features & AUTOCLEAR_GENERATION
        if not is_set or not found or len(found.data) != extensions.GENERATION_LENGTH:
            return None
        return extensions.parse_generation(found.data)

    @property
    def token(self) -> bytes | None:
        """The token of the generation; None if the image records none."""
        return self.generation.token if self.generation else None

    @property
    def known_autoclear(self) -> int:
        """The autoclear bits that this library keeps true when it writes; it clears all others."""
        return KNOWN_AUTOCLEAR | (AUTOCLEAR_GENERATION if self.generation else 0)

    def find(self, type: int) -> HeaderExtension | None:
        """Returns the last header extension of a type, which is the one that QEMU uses."""
        return next((e for e in reversed(self.area.extensions) if e.type == type), None)

    def payload_offset(self, type: int) -> int | None:
        """Returns the host offset of the data of the extension that `find` returns, or None."""
        return self.area.payload_offset(type, self.extensions_offset)

    @property
    def backing_file(self) -> str | None:
        """The name of the backing file; the file itself is never opened (INV-NOPATH)."""
        offset, size = self.header.backing_file_offset, self.header.backing_file_size
        if not 0 < offset <= self.cluster_size or not size:
            return None
        return self._seen[offset : offset + min(size, 1023)].decode("utf-8", "surrogateescape")

    def lock(self) -> AbstractContextManager[None]:
        """Returns a context manager for the read lock of the storage; no lock with force_share.

        Entering it raises:
            ImageLockedError: another process writes to the image.
            StorageError: the file system has no such locks.
        """
        self._require_open()
        return nullcontext() if self._force_share else self.storage.read_lock()

    def close(self) -> None:
        """Ends all reading, also if the storage itself stays open."""
        self._is_closed = True

    def _require_open(self) -> None:
        if self._is_closed:
            raise StateError("closed", "open")

    def verify(self) -> None:
        """Reads the header area again and compares it with what was read first.

        Raises:
            ChangedWhileReadingError: the header area has changed.
            StorageError: reading failed.
        """
        if self.read(0, len(self._seen)) != self._seen:
            raise ChangedWhileReadingError(self.storage.name, "header")

    @property
    def is_watched(self) -> bool:
        """Whether `verify_untouched` notices every write."""
        return not self._force_share and self._token is not None

    def verify_untouched(self) -> None:
        """Compares the change token of the storage with the first one; not with force_share.

        Comparing metadata is not enough: after two writes, the same metadata may be at the same
        place again.

        Raises:
            ChangedWhileReadingError: another writer has written to the image.
            StorageError: the storage could not be asked.
        """
        if not self._force_share and self.storage.change_token() != self._token:
            raise ChangedWhileReadingError(self.storage.name, "image")

    def contains(self, offset: int, length: int) -> bool:
        """Whether these bytes lie in the file; the last cluster of the file counts as whole."""
        return offset + length <= align_up(self.file_size, self.cluster_size)

    def next_data(self, offset: int) -> int:
        """Returns the first byte at or after ``offset`` that is in no hole; else the file size.

        Raises:
            StorageError: the storage could not be asked.
        """
        self._require_open()
        is_inside = offset < self.file_size
        return min(self._holes.next_data(offset), self.file_size) if is_inside else self.file_size

    def next_hole(self, offset: int) -> int:
        """Returns the first byte at or after ``offset`` that is in a hole; else the file size.

        Raises:
            StorageError: the storage could not be asked.
        """
        self._require_open()
        is_inside = offset < self.file_size
        return min(self._holes.next_hole(offset), self.file_size) if is_inside else self.file_size

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fills ``buffer`` from host ``offset`` on; bytes beyond the end of the file are zeros.

        Raises:
            LimitError: ``buffer`` would reach beyond the last cluster of the file.
            StorageError: reading failed.
        """
        self._require_open()
        if not self.contains(offset, len(buffer)):
            end = offset + len(buffer)
            raise LimitError("the end of a structure", end, self.file_size)
        inside = max(0, min(len(buffer), self.file_size - offset))
        read_exactly(self.storage, offset, buffer[:inside])
        if inside < len(buffer):
            buffer[inside:] = bytes(len(buffer) - inside)

    def read(self, offset: int, length: int) -> bytes:
        """Reads ``length`` bytes from host ``offset`` on; raises as `read_into` does."""
        buffer = bytearray(length)
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

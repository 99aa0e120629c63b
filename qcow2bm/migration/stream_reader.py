"""Parses the bytes of a migration stream into events about dirty bitmaps: no I/O, no waiting.

*Spec*: spec/stream.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from qcow2bm.errors import FormatError, Qcow2BmError, UnsupportedError
from qcow2bm.format import stream, stream_bitmap, stream_ram
from qcow2bm.format.stream import Section
from qcow2bm.format.stream_buffer import NeedDataError, StreamBuffer
from qcow2bm.migration.stream_records import BitmapRecords, Event, StreamEnd
from qcow2bm.units import decode_name, escape


class StreamReader:
    """Takes a migration stream in pieces of any size, and returns the events about dirty bitmaps.

    The stream is that of a whole migration, by precopy or postcopy, or the sections of the bitmaps
    alone. Either must come from its beginning.

    *Guarantees*: the events are the same, however the stream is cut into pieces. Of the stream,
    only the names of the bitmaps and one incomplete record of a few KiB are kept. No event follows
    the first fault.

    Attributes:
        is_stream: whether the first bytes are those of a migration stream.
    """

    def __init__(self) -> None:
        self.is_stream = False
        self._window = StreamBuffer()
        self._state: Callable[[], None] = self._begin
        self._events: list[Event] = []
        self._fault: Qcow2BmError | None = None
        self._is_whole = True  # False for the sections of the bitmaps alone
        self._is_after_bitmaps = False
        self._section = Section(0, 0)
        self._sections: dict[int, bytes] = {}
        self._left = 0  # bytes of a package, or of RAM blocks, or capabilities, that are to come
        self._pages_end = 0
        self._options = stream_ram.Options()
        self._records = BitmapRecords()

    def feed(self, data: bytes) -> list[Event]:
        """Returns the events in the next piece of the stream.

        If events precede a fault in the piece, they are returned, and the next call raises.

        Raises:
            FormatError: the stream breaks a rule of the format; ``offset`` is the place in the
                stream.
            UnsupportedError: a legal record before the bitmaps cannot be parsed.
            LimitError: there are too many bitmaps.
        """
        self._raise_fault()
        self._events = []
        window = self._window
        window.feed(bytes(data))
        try:
            while True:
                self._state()
                window.commit()
        except NeedDataError:
            window.rewind()
        except Qcow2BmError as error:
            self._fault = error
            if not self._events:
                raise
        return self._events

    def finish(self) -> list[Event]:
        """Returns the last events, once all pieces were fed.

        Raises:
            FormatError: the stream is cut off.
            Qcow2BmError: the fault that the last call of `feed` did not raise.
        """
        self._raise_fault()
        if self._state == self._ended:
            return []
        is_between = self._state in (self._next, self._footer) and not self._window.length
        if is_between and self._is_after_bitmaps and not self._is_whole:
            self._events = []
            self._end()
            return self._events
        offset = self._window.offset + self._window.length
        raise FormatError("migration stream", "", offset, "is cut off")

    def _raise_fault(self) -> None:
        if self._fault:
            raise self._fault

    # The states: each parses one thing that is there as a whole, or raises NeedDataError.

    def _begin(self) -> None:
        window = self._window
        if window.peek() == stream.SECTION_START:
            self._is_whole = False
            self._state = self._next
        else:
            stream.parse_envelope(window)
            self.is_stream = True
            self._state = self._configuration

    def _configuration(self) -> None:
        """The configuration, which depends on the machine type."""
        if self._window.peek() == stream.CONFIGURATION:
            stream.parse_configuration(self._window)
            self._state = self._subsection
        else:
            self._state = self._next

    def _subsection(self) -> None:
        window = self._window
        if window.peek() != stream.SUBSECTION:
            self._state = self._next
            return
        idstr = stream.parse_subsection(window)
        if idstr == b"configuration/target-page-bits":
            (bits,) = window.read(stream.U32)
            if bits not in stream_ram.PAGE_BITS:
                window.reject("configuration", "target page bits", f"is {bits}", 4)
            self._options = self._options._replace(page_size=1 << bits)
        elif idstr == b"configuration/capabilities":
            (self._left,) = window.read(stream.U32)
            self._state = self._capability
        elif idstr == b"configuration/uuid":
            window.skip(16)
        else:
            raise UnsupportedError(f'subsection "{_text(idstr)}" of a migration stream')

    def _capability(self) -> None:
        """One name in the list of capabilities; each of them changes the layout of the stream."""
        if not self._left:
            self._state = self._subsection
            return
        name = stream.parse_string(self._window)
        if name == b"x-ignore-shared":
            self._options = self._options._replace(has_block_address=True)
        elif name == b"mapped-ram":
            self._options = self._options._replace(is_mapped=True)
        else:
            raise UnsupportedError(f'capability "{_text(name)}" in a migration stream')
        self._left -= 1

    def _next(self) -> None:
        """A record of any type, between sections."""
        window = self._window
        type = window.peek()
        if type == stream.COMMAND:
            self._command(*stream.parse_command(window))
        elif type in (stream.EOF, stream.SECTION_FULL):
            self._end()
        elif type == stream.SECTION_START:
            self._begin_section(stream.parse_section(window))
        elif type in (stream.SECTION_PART, stream.SECTION_END):
            section = stream.parse_section(window)
            if section.section_id not in self._sections:
                window.reject("section", "section_id", f"is {section.section_id}: never begun", 4)
            self._open(section)
        else:
            name = stream.RECORD_TYPES.get(type, f"{type:#x}")
            window.reject("migration stream", "type", f"is {name}, which cannot stand here")

    def _end(self) -> None:
        """Ends the events: device state comes after all bitmaps, except in a package."""
        name = self._records.incomplete
        if name is not None:
            reason = f'ends the stream, but the bitmap "{escape(name)}" is not complete'
            self._reject("migration stream", "type", reason)
        self._events.append(StreamEnd())
        self._state = self._ended

    def _command(self, command: int, data: bytes) -> None:
        if command == stream.POSTCOPY_ADVISE and data:
            self._options = self._options._replace(has_block_page_size=True)
        if command == stream.PACKAGED:
            if len(data) != stream.U32.size:
                reason = f"is {len(data)}, must be {stream.U32.size}"
                self._window.reject("command PACKAGED", "length", reason, len(data) + 2)
            (self._left,) = stream.U32.unpack(data)
            self._state = self._package

    def _package(self) -> None:
        """A stream of device state within the stream; all of it is skipped."""
        length = min(self._left, self._window.length)
        self._window.skip(length)
        self._window.commit()
        self._left -= length
        if self._left:
            raise NeedDataError
        self._state = self._next

    def _begin_section(self, section: Section) -> None:
        known = {
            stream_ram.RAM: stream_ram.RAM_VERSION,
            stream_bitmap.DIRTY_BITMAP: stream_bitmap.DIRTY_BITMAP_VERSION,
        }
        idstr, version = section.idstr, section.version_id
        if idstr not in known:
            raise UnsupportedError(f'section "{_text(idstr)}" before the dirty bitmaps')
        if version != known[idstr]:
            reason = f"is {version}, must be {known[idstr]}"
            self._window.reject("section", "version_id", reason, 4)
        if section.section_id in self._sections or idstr in self._sections.values():
            self._reject("section", "section_id", f"{section.section_id} was begun before")
        self._sections[section.section_id] = idstr
        self.is_stream = True
        self._open(section)

    def _open(self, section: Section) -> None:
        self._section = section
        is_ram = self._sections[section.section_id] == stream_ram.RAM
        self._state = self._ram if is_ram else self._dirty_bitmap

    def _close(self) -> None:
        """Ends the body of a section; in postcopy, more may follow even after SECTION_END."""
        section = self._section
        if section.type == stream.SECTION_END:
            idstr = self._sections[section.section_id]
            self._is_after_bitmaps |= idstr == stream_bitmap.DIRTY_BITMAP
        self._state = self._footer

    def _footer(self) -> None:
        """The footer of a section, which depends on the machine type."""
        window = self._window
        if window.peek() == stream.FOOTER:
            footer = stream.parse_section(window)
            if footer.section_id != self._section.section_id:
                reason = f"is {footer.section_id}, not that of the section"
                window.reject("footer", "section_id", reason, 4)
        self._state = self._next

    def _ended(self) -> None:
        self._window.skip(self._window.length)
        self._window.commit()
        raise NeedDataError

    def _ram(self) -> None:
        """A page of memory, or the list of its blocks."""
        page = stream_ram.parse_page(self._window, self._options.page_size)
        if page.flags == stream_ram.MEM_SIZE:
            self._left = page.address
            self._state = self._block
        elif page.flags == stream_ram.EOS:
            self._close()

    def _block(self) -> None:
        if not self._left:
            self._state = self._ram
            return
        length = stream_ram.parse_block(self._window, self._options)
        if length > self._left:
            self._reject("ram block", "length", f"is {length}, of {self._left} that are left")
        if self._options.is_mapped:
            self._pages_end = stream_ram.parse_mapped_block(self._window, length)
            self._state = self._pages
        self._left -= length

    def _pages(self) -> None:
        """The pages of a block, in a file that gives each page a fixed place; they are skipped."""
        left = self._pages_end - self._window.offset
        length = min(left, self._window.length)
        self._window.skip(length)
        self._window.commit()
        if length < left:
            raise NeedDataError
        self._state = self._block

    def _dirty_bitmap(self) -> None:
        """A record of a dirty-bitmap section."""
        window = self._window
        record = stream_bitmap.parse_record(window)
        if record.flags != stream_bitmap.EOS:
            self._events.append(self._records.take(record, window.start))
        if record.flags & stream_bitmap.EOS:
            self._close()

    def _reject(self, structure: str, field: str, reason: str) -> NoReturn:
        raise FormatError(structure, field, self._window.start, reason)


def _text(idstr: bytes) -> str:
    return escape(decode_name(idstr))

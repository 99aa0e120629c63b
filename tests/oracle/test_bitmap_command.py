"""The command ``bitmap`` beside ``qemu-img bitmap``: the same call on equal copies of an image."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support import console, qemu
from support.qemu import Disk, StorageDaemon, held_by_storage_daemon
from support.qemu_facts import fact
from support.specreader import page
from support.twin import SECTOR, KiB, MiB

from qcow2bm.units import escape

SIZE = 10 * MiB + SECTOR
"""The last granule of each bitmap is not full."""

AUTOCLEAR_BYTE, INCOMPATIBLE_BYTE = 88 + 7, 72 + 7
TARGET = "vm.qcow2"


# --- the images ---------------------------------------------------------------------------------


def make(path: Path, size: int = SIZE, /, *arguments: str, **options: object) -> Disk:
    """A small image with the bitmap "daily", in which something is dirty."""
    options = {"cluster_size": 4 * KiB} | options
    disk = Disk.create(path, size, *arguments, **options)
    disk.add("daily", 64 * KiB)
    disk.io("write -z 1k 2k", f"write -z {size // 3 // SECTOR * SECTOR} 3k")
    return disk


def patch(path: Path, offset: int, value: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] = value
    path.write_bytes(data)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one image of each kind."""
    folder = tmp_path_factory.mktemp("store")
    disk = make(folder / TARGET)
    for name, granularity in (
        ("weekly", MiB),
        ("fine", 512),
        ("hourly", 8 * KiB),
        ("@1", 4 * KiB),
        ("ü b", 64 * KiB),
    ):
        disk.add(name, granularity)
    disk.io("write -z 5M 512", "write -z 7M 1536")
    disk.bitmap("weekly", "--disable")
    disk.io("write -z 3M 512")

    make(folder / "old.qcow2").io("write -z 9M 64k")
    make(folder / "bigger.qcow2", 20 * MiB)
    make(folder / "tiny.qcow2", 10240, cluster_size=512)
    make(folder / "big-clusters.qcow2", cluster_size="2M")
    zstd = {} if fact("zstd") == "no" else {"compression_type": "zstd"}
    make(folder / "zstd.qcow2", refcount_bits=1, **zstd)
    make(folder / "odd:x,y.qcow2")
    make(folder / "luks.qcow2", **{"encrypt.format": "luks"})
    make(folder / "data.qcow2", data_file=folder / "data.ext")
    make(folder / "lost.qcow2", data_file=folder / "gone")
    (folder / "gone").unlink()
    backing = "-b", str(folder / "base"), "-F", "qcow2"
    Disk.create(folder / "base", SIZE).io("write -P 1 0 64k")
    make(folder / "over.qcow2", SIZE, *backing)
    make(folder / "baseless.qcow2", SIZE, *backing)
    qemu.run_ok("qemu-img", "rebase", "-u", "-b", "gone", "-F", "qcow2", folder / "baseless.qcow2")
    Disk.create(folder / "empty.qcow2", 0)
    Disk.create(folder / "plain.qcow2", SIZE)
    Disk.create(folder / "huge.qcow2", 2 << 40)
    Disk.create(folder / "too-huge.qcow2", (2 << 40) + SECTOR)
    Disk.create(folder / "version-2.qcow2", SIZE, compat="0.10")
    long_name = f"{folder}{'/' * (441 - len(f'{folder}base'))}base"
    Disk.create(folder / "full.qcow2", SIZE, "-b", long_name, "-F", "qcow2", cluster_size=KiB)

    crashed = make(folder / "crashed.qcow2")
    crashed.add("weekly", 64 * KiB)
    crashed.crash("write 2M 64k")
    crashed.add("new", 64 * KiB)
    for name, byte, value in (
        ("stale.qcow2", AUTOCLEAR_BYTE, 0),
        ("dirty.qcow2", INCOMPATIBLE_BYTE, 1),
        ("corrupt.qcow2", INCOMPATIBLE_BYTE, 2),
        ("unknown.qcow2", INCOMPATIBLE_BYTE, 64),
        ("version-9.qcow2", 7, 9),
    ):
        patch(make(folder / name).path, byte, value)
    (folder / "raw.img").write_bytes(b"raw" * 1000)
    (folder / "nothing.img").touch()
    (folder / "short.qcow2").write_bytes((folder / "plain.qcow2").read_bytes()[:100])
    (folder / "folder.d").mkdir()
    make(folder / "link.qcow2.real")
    (folder / "link.qcow2").symlink_to("link.qcow2.real")
    return folder


# --- the calls ----------------------------------------------------------------------------------


ACTIONS = ("--add", "--remove", "--clear", "--enable", "--disable", "--merge=fine")
"""Every action; the source of the merge is there."""

COMBINATIONS = [
    (*actions, TARGET, name)
    for name in ("daily", "new")
    for count in (1, 2)
    for actions in product(ACTIONS, repeat=count)
]

WORKING = """
--add --disable vm.qcow2 new
--add --disable --merge daily --merge weekly vm.qcow2 new
--add --merge daily --disable --merge fine --enable vm.qcow2 new
--add --remove --add --disable vm.qcow2 new
--clear --merge weekly --merge fine vm.qcow2 daily
--merge weekly --merge daily --clear --merge fine vm.qcow2 @1
--remove --add -g 1M vm.qcow2 daily
--disable --enable --disable --disable vm.qcow2 daily
--merge daily vm.qcow2 daily
--merge fine vm.qcow2 weekly
--merge weekly vm.qcow2 fine
--merge @1 vm.qcow2 weekly
--disable vm.qcow2 @1
--merge daily -b old.qcow2 vm.qcow2 weekly
--merge daily -b old.qcow2 -F qcow2 vm.qcow2 weekly
--add --merge daily --merge daily -b old.qcow2 -F qcow2 -g 512 vm.qcow2 new
--merge daily -b file:old.qcow2 vm.qcow2 daily
--merge daily -b json:{"driver":"qcow2","file.filename":"old.qcow2"} vm.qcow2 daily
--merge daily -b over.qcow2 vm.qcow2 daily
--merge daily -b baseless.qcow2 vm.qcow2 daily
--merge daily -b data.qcow2 vm.qcow2 daily
--merge daily -b big-clusters.qcow2 vm.qcow2 fine
--merge weekly -b vm.qcow2 old.qcow2 daily
--merge new -b crashed.qcow2 vm.qcow2 daily
--merge=new crashed.qcow2 new
--remove crashed.qcow2 daily
--remove --add crashed.qcow2 daily
--add crashed.qcow2 more
--disable crashed.qcow2 new
--add tiny.qcow2 new
--add -g 512 tiny.qcow2 new
--add -g 512 --merge daily tiny.qcow2 new
--add -g 2G --merge daily tiny.qcow2 new
--add big-clusters.qcow2 new
--clear big-clusters.qcow2 daily
--add zstd.qcow2 new
--remove zstd.qcow2 daily
--add over.qcow2 new
--remove over.qcow2 daily
--add baseless.qcow2 new
--add data.qcow2 new
--clear data.qcow2 daily
--add plain.qcow2 first
--add huge.qcow2 new
--add -g 512 huge.qcow2 new
--add -g 1k too-huge.qcow2 new
--add link.qcow2 new
--add ./vm.qcow2 new
--add file:vm.qcow2 new
--add file:./vm.qcow2 new
--add file:{folder}/vm.qcow2 new
--add {folder}/vm.qcow2 new
--add file:odd:x,y.qcow2 new
--add ./odd:x,y.qcow2 new
--add -f qcow2 vm.qcow2 new
--add -f qcow2 file:vm.qcow2 new
--add -f qcow2 json:{"file.filename":"vm.qcow2"} new
--add json:{"driver":"qcow2","file":{"driver":"file","filename":"vm.qcow2"}} new
--add json:{"driver":"qcow2","file":{"filename":"vm.qcow2"}} new
--add json:{"driver":"qcow2","file.filename":"vm.qcow2"} new
--add json:{"driver":"qcow2","file.driver":"file","file.filename":"vm.qcow2"} new
--add json:{"file.filename":"odd:x,y.qcow2"} new
--add --image-opts driver=qcow2,file.filename=vm.qcow2 new
--add --image-opts driver=qcow2,file.driver=file,file.filename=vm.qcow2 new
--add --image-opts file.filename=vm.qcow2 new
--add --image-opts file.filename=odd:x,,y.qcow2,driver=qcow2 new
--add --image-opts file.filename=gone,file.filename=vm.qcow2 new
--add --image-opts file.filename=vm.qcow2, new
--merge daily -b old.qcow2 -F qcow2 --image-opts file.filename=vm.qcow2 daily
vm.qcow2 daily --clear
vm.qcow2 --clear daily
--clear -- vm.qcow2 daily
--clear vm.qcow2 -- daily
--add -- vm.qcow2 --add
--add vm.qcow2 -- -x
--add -g64k vm.qcow2 new
--add -fqcow2 vm.qcow2 new
--merge=daily vm.qcow2 weekly
--merge daily -bold.qcow2 -Fqcow2 vm.qcow2 daily
--merge daily --source-file old.qcow2 --source-format qcow2 vm.qcow2 weekly
--merge daily --source-fi=old.qcow2 --source-fo=qcow2 vm.qcow2 weekly
--add --granularity 4k vm.qcow2 new
--add --g=4k vm.qcow2 new
--rem vm.qcow2 daily
--ad vm.qcow2 new
--a vm.qcow2 new
--r vm.qcow2 daily
--c vm.qcow2 daily
--e vm.qcow2 weekly
--d vm.qcow2 daily
--m daily vm.qcow2 weekly
--mer=daily vm.qcow2 weekly
--i --a file.filename=vm.qcow2 new
--add -g 4k -g 1M vm.qcow2 new
--add -f raw -f qcow2 vm.qcow2 new
--merge daily -b gone -b old.qcow2 vm.qcow2 daily
--remove -g 0 vm.qcow2 daily
--add -g 0 vm.qcow2 new
--add -g 512 vm.qcow2 new
--add -g 64K vm.qcow2 new
--add -g 65536 vm.qcow2 new
--add -g 0x10000 vm.qcow2 new
--add -g 0X1000 vm.qcow2 new
--add -g 0x10k vm.qcow2 new
--add -g +64k vm.qcow2 new
--add -g 064k vm.qcow2 new
--add -g 1m vm.qcow2 new
--add -g 1.k vm.qcow2 new
--add -g 0.5M vm.qcow2 new
--add -g 64.0k vm.qcow2 new
--add -g 512b vm.qcow2 new
--add -g 1024.0 vm.qcow2 new
--add -g 2G vm.qcow2 new
"""

FAILING = """
vm.qcow2
vm.qcow2 daily
--add
--add vm.qcow2
--add vm.qcow2 new more
--add --
-- --add vm.qcow2 new
--bogus vm.qcow2 daily
--add -x vm.qcow2 new
--add=1 vm.qcow2 new
--add --image-opts=1 vm.qcow2 new
--add -U vm.qcow2 new
-g
--add vm.qcow2 new -f
--merge
--add --merg
--merge daily --source-f old.qcow2 vm.qcow2 daily
--merge daily --s=old.qcow2 vm.qcow2 daily
--add --f qcow2 vm.qcow2 new
--clear --co vm.qcow2 new
--merge -- vm.qcow2 daily
--merge --add vm.qcow2 daily
-b --merge --merge daily vm.qcow2 daily
--merge= vm.qcow2 daily
--add -g foo vm.qcow2 new
--add -gfoo --bogus vm.qcow2 new
--bogus -gfoo vm.qcow2 new
--add -g=64k vm.qcow2 new
--add -g 64KiB vm.qcow2 new
--add -g 64kk vm.qcow2 new
--add -g 1e3 vm.qcow2 new
--add -g 1.5 vm.qcow2 new
--add -g .5M vm.qcow2 new
--add -g -1 vm.qcow2 new
--add -g -0 vm.qcow2 new
--add -g 0x vm.qcow2 new
--add -g 0x.8 vm.qcow2 new
--add -g 0x1p16 vm.qcow2 new
--add -g inf vm.qcow2 new
--add -g k vm.qcow2 new
--add -g 9E vm.qcow2 new
--add -g 99999999999999999999 vm.qcow2 new
--add -g 9223372036854775808 vm.qcow2 new
--add -g 9223372036854775807 vm.qcow2 new
--add -g 1 vm.qcow2 new
--add -g 256 vm.qcow2 new
--add -g 511 vm.qcow2 new
--add -g 1.5k vm.qcow2 new
--add -g 64b vm.qcow2 new
--add -g 4G vm.qcow2 new
--add -g 1T vm.qcow2 new
--add -g 1e vm.qcow2 new
--add -g 65535 vm.qcow2 daily
--remove -g 64k vm.qcow2 daily
--clear -F qcow2 vm.qcow2 daily
--clear -b old.qcow2 vm.qcow2 daily
--clear -b old.qcow2 -F qcow2 -g 4k vm.qcow2 daily
--add --clear -F qcow2 -g 4k vm.qcow2
--add -f qcow2 --image-opts file.filename=vm.qcow2 new
--add nofile new
--add nofolder/vm.qcow2 new
--add vm.qcow2/ new
--add - new
--add odd:x,y.qcow2 new
--add json:{"file.filename":"nofile"} new
--add json:{"driver":"qcow2","file":{"driver":"file","filename":"nofile"}} new
--add --image-opts file.filename=nofile new
--add --image-opts driver=qcow2,file.filename= new
--add json:{"driver":"qcow2","file":{"driver":"file","filename":5}} new
--add json:[] new
--add nosuch:vm.qcow2 new
--merge daily -b nofile vm.qcow2 daily
--merge daily -b file.filename=old.qcow2 --image-opts file.filename=vm.qcow2 daily
--merge daily -b vm.qcow2 vm.qcow2 daily
--merge nope vm.qcow2 daily
--merge nope -b old.qcow2 vm.qcow2 daily
--merge daily vm.qcow2 nope
--merge daily -b bigger.qcow2 vm.qcow2 daily
--merge daily -b crashed.qcow2 vm.qcow2 daily
--merge daily crashed.qcow2 new
--merge new crashed.qcow2 daily
--clear crashed.qcow2 daily
--enable crashed.qcow2 weekly
--disable crashed.qcow2 weekly
--add crashed.qcow2 daily
--add -g 512 too-huge.qcow2 new
"""


class Deviation(NamedTuple):
    """What may differ in a case of spec/deviations.md, in words, and calls that show the case."""

    differs: str
    calls: str


DEVIATIONS = {
    "several actions, of which a later one fails": Deviation(
        "bitmaps",
        """
--add --add vm.qcow2 new
--clear --merge nope vm.qcow2 daily
--disable --merge daily -b bigger.qcow2 vm.qcow2 daily
""",
    ),
    "the content of stale bitmaps": Deviation(
        "status message bitmaps",
        """
--add stale.qcow2 new
--clear stale.qcow2 daily
--remove stale.qcow2 daily
""",
    ),
    "an image with a fault, or with the dirty bit": Deviation(
        "status bitmaps",
        """
--add dirty.qcow2 new
--remove dirty.qcow2 daily
""",
    ),
    "an encrypted image, and no secret": Deviation(
        "status message bitmaps",
        """
--add luks.qcow2 new
--remove luks.qcow2 daily
--merge daily -b luks.qcow2 vm.qcow2 weekly
""",
    ),
    "--object": Deviation(
        "status message bitmaps",
        """
--add --object secret,id=key,data=secret vm.qcow2 new
--add --ob=secret,id=key,data=secret vm.qcow2 new
--add --object bogus vm.qcow2 new
--add --object secret,id=key,data=secret --im encrypt.key-secret=key,file.filename=luks.qcow2 new
""",
    ),
    "an external data file that is missing": Deviation(
        "status message bitmaps",
        """
--add lost.qcow2 new
--merge daily -b lost.qcow2 vm.qcow2 weekly
""",
    ),
    "other options, drivers or protocols in FILENAME": Deviation(
        "status message bitmaps",
        """
--add --image-opts driver=qcow2,file.locking=off,file.filename=vm.qcow2 new
--add --image-opts driver=qcow2,node-name=x,file.filename=vm.qcow2 new
--add --image-opts lazy-refcounts=on,file.filename=vm.qcow2 new
--add --image-opts driver=qcow2,file.driver=raw,file.file.filename=vm.qcow2 new
--add --image-opts driver=bogus,file.filename=vm.qcow2 new
--add --image-opts driver=qcow2,bogus=1,file.filename=vm.qcow2 new
--add --image-opts driver=qcow2,,file.filename=vm.qcow2 new
--add --image-opts driver=qcow2,filename=vm.qcow2 new
--add --image-opts file=vm.qcow2 new
--add --image-opts vm.qcow2 new
--add json:{"driver":"qcow2","file":{"driver":"file","filename":"vm.qcow2","locking":"off"}} new
--add json:{"driver":"qcow2","file":"vm.qcow2"} new
--add json:{"driver":"file","filename":"vm.qcow2"} new
--add json:{"file":{"driver":"nbd","filename":"vm.qcow2"}} new
--add json:{} new
--add json:{bad new
--add nbd:vm.qcow2 new
""",
    ),
    "JSON in single quotes": Deviation(
        "status bitmaps",
        """
--add json:{'file.filename':'vm.qcow2'} new
""",
    ),
    "a granularity of 4 GiB or more whose lowest 32 bits are a granularity": Deviation(
        "status bitmaps",
        """
--add -g 4294967808 vm.qcow2 new
""",
    ),
    "a disk of 0 bytes": Deviation(
        "status message",
        """
--add empty.qcow2 new
""",
    ),
    "a first bitmap, and no room for a second copy of the backing file name": Deviation(
        "status bitmaps",
        """
--add full.qcow2 new
""",
    ),
    "--remove-all and --format, which newer versions of QEMU have": Deviation(
        "status message bitmaps",
        """
--remove-all vm.qcow2
--add --format qcow2 vm.qcow2 new
""",
    ),
    "why an image cannot be opened, or a bitmap not be stored": Deviation(
        "message",
        """
--add corrupt.qcow2 new
--add unknown.qcow2 new
--add version-2.qcow2 new
--remove version-2.qcow2 new
--add version-9.qcow2 new
--add short.qcow2 new
--add folder.d new
--add -f qcow2 nothing.img new
--add -f qcow2 raw.img new
""",
    ),
    "a file that is no qcow2 image, or another format in -f or -F": Deviation(
        "message",
        """
--add raw.img new
--remove raw.img new
--add nothing.img new
--add -f raw raw.img new
--add -f raw vm.qcow2 new
--clear -f raw vm.qcow2 daily
--add -f vmdk vm.qcow2 new
--add -f bogus vm.qcow2 new
--add -f raw json:{"driver":"qcow2","file.filename":"vm.qcow2"} new
--add --image-opts driver=raw,file.filename=vm.qcow2 new
--merge daily -b raw.img vm.qcow2 daily
--merge daily -b old.qcow2 -F raw vm.qcow2 daily
--merge daily -b old.qcow2 -F bogus vm.qcow2 daily
""",
    ),
    "a source whose bitmaps are stale": Deviation(
        "message",
        """
--merge daily -b stale.qcow2 vm.qcow2 daily
""",
    ),
    "a name in a message that cannot be printed, or with a quote or a backslash": Deviation(
        "message", ""
    ),
}
"""The cases of spec/deviations.md."""

LONGEST = "n" * 1023
ODD_NAMES = ("ü b", "日次💾", "a b", "%s%n", "a\nb", "\x1b[31m", 'a"\\', "\udcff\udcfe", LONGEST)

Arguments = tuple[str, ...]


class Call(NamedTuple):
    """A call, and the case of spec/deviations.md in which it may have another result than QEMU."""

    arguments: Arguments
    deviation: str = ""


def split(lines: str) -> list[Arguments]:
    return [tuple(line.split(" ")) for line in lines.strip().splitlines()]


*_, UNPRINTABLE = DEVIATIONS

CALLS = [
    *(Call(arguments) for arguments in split(WORKING)),
    *(Call(arguments) for arguments in split(FAILING)),
    *(Call(("--add", TARGET, name)) for name in ODD_NAMES if name != "ü b"),
    Call(()),
    Call(("--add", TARGET, "")),
    Call(("--remove", TARGET, "")),
    Call(("--merge", "", TARGET, "daily")),
    Call(("--add", "", "new")),
    Call(("--add", "-g", "", TARGET, "new")),
    Call(("--add", "-g", " 64k", TARGET, "new")),
    Call(("--add", "-g", "64k ", TARGET, "new")),
    Call(("--add", TARGET, f"{LONGEST}n")),
    Call(("--remove", TARGET, f"{LONGEST}n")),
    Call(("--clear", TARGET, "ü b")),
    Call(("--add", TARGET, "ü b")),
    Call(("--merge", "ü b", TARGET, "daily")),
    *(Call(("--remove", TARGET, name), UNPRINTABLE) for name in ODD_NAMES[5:8]),
    *(Call(args, case) for case, (_, calls) in DEVIATIONS.items() for args in split(calls)),
]


# --- what comes of a call -----------------------------------------------------------------------


class Found(NamedTuple):
    """What QEMU finds in an image: the bitmaps, their bits, and the status of a check."""

    listed: list[dict[str, Any]]
    bits: dict[str, str]
    check: int


class Side(NamedTuple):
    """What a call left behind: its status and its message, the images, and all files."""

    status: int
    line: str
    images: dict[str, Found | None]
    files: dict[str, bytes]


def files_of(store: Path, arguments: Sequence[str]) -> list[Path]:
    """The files that arguments name, and those whose names only go on behind such a name."""
    text = " ".join(arguments)
    named = tuple(path.name for path in store.iterdir() if path.name in text)
    return [path for path in store.iterdir() if path.name.startswith(named)] if named else []


def look(path: Path, daemon: StorageDaemon) -> Found | None:
    """What QEMU finds in an image; None if QEMU does not open the image."""
    disk = Disk(path, "luks" if path.name == "luks.qcow2" else "")
    try:
        listed = disk.listed()
        daemon.open(disk)
    except (qemu.ToolError, qemu.QmpError, KeyError):
        return None
    try:
        # A name that is not UTF-8 cannot be asked for.
        names = [name for name in daemon.bitmaps() if "\ufffd" not in name]
        bits = {name: daemon.sha256(name) for name in names}
    finally:
        daemon.close()
    return Found(listed, bits, disk.check().returncode)


class Bench:
    """Runs calls of both programs, each in a folder with copies of the images."""

    def __init__(self, store: Path, folder: Path, daemon: StorageDaemon) -> None:
        self._store, self._daemon = store, daemon
        self.theirs, self.ours = folder / "theirs", folder / "ours"

    def prepare(self, arguments: Sequence[str]) -> dict[str, bytes]:
        """Copies the files that the arguments name; returns their content."""
        files = files_of(self._store, arguments)
        for folder in (self.theirs, self.ours):
            folder.mkdir()
            for path in files:
                if path.is_dir():
                    (folder / path.name).mkdir()
                else:
                    shutil.copy(path, folder / path.name, follow_symlinks=False)
        return self._contents(self.ours)

    def call_theirs(self, arguments: Sequence[str]) -> Side:
        filled = [text.replace("{folder}", str(self.theirs)) for text in arguments]
        done = qemu.run("env", "-C", self.theirs, "qemu-img", "bitmap", *filled)
        # Before its words, QEMU 10.0 and later say how they were called, if an option is wrong.
        found = re.search(r"qemu-img(?: bitmap)?: (?!warning)(.*)", done.stderr, re.DOTALL)
        return self._side(self.theirs, done.returncode, found[1] if found else "")

    def call_ours(self, arguments: Sequence[str]) -> Side:
        filled = [text.replace("{folder}", str(self.ours)) for text in arguments]
        status, out, err = console.run(["bitmap", *filled], self.ours)
        assert out == ""
        if status:
            (line,) = err.splitlines()
            assert line.startswith("qcow2bm: ")
        else:
            line = err
        return self._side(self.ours, status, re.sub("^qcow2bm: (error: )?", "", line))

    def _side(self, folder: Path, status: int, line: str) -> Side:
        return Side(status, line, self.look(folder), self._contents(folder))

    def look(self, folder: Path) -> dict[str, Found | None]:
        """What QEMU finds in each image of a folder; None if QEMU does not open the image."""
        paths = (path for path in folder.glob("*.qcow2") if path.exists())
        return {path.name: look(path, self._daemon) for path in paths}

    def _contents(self, folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def fixed_part(text: str) -> str:
    """What a message of qemu-img begins with, without what it says twice or only QEMU knows."""
    line = text.partition("\n")[0]
    line = re.sub("(Invalid granularity specified).*", r"\1", line)
    line = re.sub("(Need at least one of .*)--remove-all, ", r"\1", line)
    line = re.sub(r"(Could not open '.*?': )Could not open '.*': ", r"\1", line)
    return re.sub(r" in '#block\d+': .*", "", line)


def differences(theirs: Side, ours: Side) -> set[str]:
    said = ours.line.replace('\\"', '"')  # quotes are escaped
    is_usage = "\nTry '" in theirs.line and fact("usage") != "qemu-img"
    found = {
        "status": theirs.status != ours.status,
        "message": not (is_usage or said.startswith(fixed_part(theirs.line))),
        "bitmaps": theirs.images != ours.images,
    }
    return {what for what, is_different in found.items() if is_different}


@pytest.fixture(scope="module")
def daemon() -> Iterator[StorageDaemon]:
    with StorageDaemon() as daemon:
        yield daemon


@pytest.fixture
def bench(store: Path, tmp_path: Path, daemon: StorageDaemon) -> Bench:
    return Bench(store, tmp_path, daemon)


def compare(bench: Bench, arguments: Arguments) -> set[str]:
    """Calls both programs; returns in what they differ. If ours fails, it changes no file."""
    before = bench.prepare(arguments)
    theirs, ours = bench.call_theirs(arguments), bench.call_ours(arguments)
    assert bool(theirs.line) or not theirs.status
    assert ours.status in (0, 1)
    if ours.status:
        assert ours.files == before
    else:
        assert ours.line == ""
        # The status of a check is 1 if the backing file is missing.
        assert all(found.check in (0, 1) for found in ours.images.values() if found)
    return differences(theirs, ours)


# --- the comparison -----------------------------------------------------------------------------


def name_of(arguments: Sequence[str]) -> str:
    return escape(" ".join(arguments))[:100]


class Changed(NamedTuple):
    """A row of spec/compatibility.md about a call, and what it has for QEMU 7.2."""

    id: str
    as_of_7_2: str


CHANGED = {
    "--add -g 0x10k vm.qcow2": Changed("hex-suffix", "yes"),
    "--add -g .5M vm.qcow2": Changed("leading-point", "no"),
    "--add -g 1e3 vm.qcow2": Changed("float", "no"),
    "--add -g -0 vm.qcow2": Changed("float", "no"),
    "--add -g 0x1p16 vm.qcow2": Changed("float", "no"),
    "--add -g 9223372036854775807 vm.qcow2": Changed("float", "no"),
    "--merge daily -b bigger.qcow2 vm.qcow2": Changed("merge-sizes", "of different sizes"),
    "--disable --merge daily -b bigger.qcow2 vm.qcow2": Changed(
        "merge-sizes", "of different sizes"
    ),
    "--add --f qcow2 vm.qcow2": Changed("long-format", "no"),
    "--add --format qcow2 vm.qcow2": Changed("long-format", "no"),
    "--remove-all": Changed("remove-all", "no"),
    "--rem vm.qcow2": Changed("remove-all", "no"),
    "--r vm.qcow2": Changed("remove-all", "no"),
}
"""Calls of which another version thinks otherwise than QEMU 7.2, which this library follows."""


@pytest.mark.spec("IMG-1", "IMG-2", "IMG-3", "IMG-5")
@pytest.mark.parametrize("call", CALLS, ids=[name_of(call.arguments) for call in CALLS])
def test_a_call_does_what_qemu_img_does(bench: Bench, call: Call) -> None:
    found = compare(bench, call.arguments)
    changed = CHANGED.get(" ".join(call.arguments[:-1]))
    if changed and fact(changed.id) != changed.as_of_7_2:
        assert found or call.deviation
    elif call.deviation:
        assert found, "no deviation any more"
        assert found <= set(DEVIATIONS[call.deviation].differs.split())
    else:
        assert found == set()


@pytest.mark.spec("IMG-4")
@pytest.mark.parametrize("arguments", COMBINATIONS, ids=map(name_of, COMBINATIONS))
def test_a_combination_does_what_qemu_img_does(bench: Bench, arguments: Arguments) -> None:
    """If the second of two actions fails, qemu-img leaves the first one done."""
    found = compare(bench, arguments)
    _, *more, _, _ = arguments
    assert found == set() or (found == {"bitmaps"} and more)


def test_only_qemu_img_drops_stale_bitmaps(bench: Bench) -> None:
    """Even if the call fails; here a look at what there would have been to salvage."""
    arguments = "--clear", "stale.qcow2", "daily"
    bench.prepare(arguments)
    assert bench.call_theirs(arguments).status == bench.call_ours(arguments).status == 1
    for folder, names in ((bench.theirs, []), (bench.ours, ["daily"])):
        patch(folder / "stale.qcow2", AUTOCLEAR_BYTE, 1)
        assert [found["name"] for found in Disk(folder / "stale.qcow2").listed()] == names


def test_the_deviations_are_those_of_the_page() -> None:
    assert page("deviations.md").table("qemu-img bitmap").column("case") == list(DEVIATIONS)


Holder = Callable[[Disk], AbstractContextManager[None]]


@contextmanager
def read_by_storage_daemon(disk: Disk) -> Iterator[None]:
    with StorageDaemon() as daemon:
        daemon.open(disk)
        yield


@contextmanager
def read_by_qemu_io(disk: Disk) -> Iterator[None]:
    with disk.held_by_qemu_io(read_only=True):
        yield


HOLDERS = (
    held_by_storage_daemon,
    Disk.held_by_qemu_io,
    read_by_storage_daemon,
    read_by_qemu_io,
)
HELD_CALLS = split("""
--add old.qcow2 new
--remove old.qcow2 daily
--add --image-opts file.filename=old.qcow2 new
--merge daily -b old.qcow2 vm.qcow2 weekly
--merge daily -b old.qcow2 -F qcow2 vm.qcow2 nope
""")


@pytest.mark.parametrize("holder", HOLDERS, ids=lambda holder: holder.__name__)
@pytest.mark.parametrize("arguments", HELD_CALLS, ids=map(name_of, HELD_CALLS))
def test_an_image_that_another_process_holds(
    bench: Bench, arguments: Arguments, holder: Holder
) -> None:
    bench.prepare(arguments)
    with holder(Disk(bench.theirs / "old.qcow2")):
        theirs = bench.call_theirs(arguments)
    with holder(Disk(bench.ours / "old.qcow2")):
        ours = bench.call_ours(arguments)
    assert differences(theirs, ours) == set()
    assert bench.look(bench.theirs) == bench.look(bench.ours)


ROWS = page("from-qemu-img.md").table("Translation").rows


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["with qemu-img"])
def test_a_row_of_the_translation_does_the_same(bench: Bench, row: dict[str, str]) -> None:
    """The command ``bitmap``, and the native commands, do what qemu-img does."""
    program, command, *arguments = row["with qemu-img"].split(" ")
    assert (program, command) == ("qemu-img", "bitmap")
    bench.prepare(arguments)
    if "--remove-all" in arguments:  # which QEMU 7.2 does not have
        for name in Disk(bench.theirs / TARGET).listed():
            bench.call_theirs(("--remove", TARGET, name["name"]))
        theirs = bench.look(bench.theirs)
    else:
        done = bench.call_theirs(arguments)
        assert done.status == 0
        theirs = done.images
    originals = bench.look(bench.ours)
    copies = {path: path.read_bytes() for path in bench.ours.iterdir()}
    assert bench.call_ours(arguments).images == theirs != originals
    for path, content in copies.items():
        path.write_bytes(content)
    for native in row["with qcow2bm"].split(" && "):
        program, *words = native.split(" ")
        assert program == "qcow2bm"
        assert console.run(words, bench.ours).status == 0
    assert bench.look(bench.ours) == theirs


def test_so_many_calls_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    count = len(CALLS) + len(COMBINATIONS) + len(HOLDERS) * len(HELD_CALLS) + len(ROWS)
    with capsys.disabled():
        print(f"\n{count} calls compared with qemu-img bitmap")
    assert count > 300

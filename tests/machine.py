"""A computer with an Intel CPU of 2023 (AMX), emulated by Bochs: runs the program of `emulated.cpp` for `emulated.py`, as .ci/amx says.

Usage: machine.py SYSTEM INIT KERNELS. SYSTEM is a folder with what .ci/amx takes from Debian's packages; INIT and KERNELS are static
programs, built of machine.cpp and emulated.cpp. Calls come and answers go as lines, as to and from KERNELS itself.

There is no firmware: the place of the BIOS has the few instructions that start Linux the way that Xen's PVH guests are started (in 32 bits,
with the address of a description in ebx). Linux and its initial files are put into memory by Bochs, and calls travel through a disk.
"""

import mmap
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, NamedTuple

MEMORY = 512 << 20
BLOCK = 128 << 10  # Bochs allots memory by blocks, in the order of their first use
PAGE, ALIGNED = 4096, 2 << 20
DISK, SECTOR, LINE_AT, LINE_SECTORS = 128 << 20, 512, 2, 16  # as in machine.cpp
LOST = 2**64 - 1  # in the place of the latest answer's number, as in machine.cpp
BIOS = 0xFFFF0000  # where the CPU begins, 16 bytes before the end
# setcpuid: Bochs has AMX without XFD (324), by which Linux learns that a program begins to use it. Without XFD Linux leaves AMX off. Bochs
# ignores what Linux writes there, so that AMX serves from the start, but Linux never saves tiles. They are lost when Linux computes in
# vector registers, or runs another program meanwhile: machine.cpp's waits, and clearcpuid keeps Linux' random numbers out of them.
COMMAND_LINE = "console=ttyS0 quiet acpi=off pci=off noapic nolapic nokaslr mitigations=off panic=-1 setcpuid=324 clearcpuid=ssse3"


class System:
    """Programs of another release of Debian than the host's, with their own libraries."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        libraries = folder / "usr/lib/x86_64-linux-gnu"
        self._loader = [str(folder / "usr/lib64/ld-linux-x86-64.so.2"), "--library-path", str(libraries)]
        self.environment = {"LTDL_LIBRARY_PATH": str(libraries / "bochs/plugins"), "PATH": os.environ["PATH"]}

    def command(self, program: str, *arguments: str) -> list[str]:
        """How it is run."""
        return [*self._loader, str(self._folder / "usr/bin" / program), *arguments]

    def linux(self) -> bytes:
        """The uncompressed kernel, out of the file that starts it."""
        (file,) = self._folder.glob("usr/lib/modules/*/vmlinuz")
        packed = file.read_bytes()
        (offset, size), sectors = struct.unpack_from("<II", packed, 0x248), packed[0x1F1] + 1
        begin = sectors * SECTOR + offset
        packed = packed[begin : begin + size - 4]  # the last four: the unpacked size
        return subprocess.run(self.command("zstd", "-dc"), input=packed, stdout=subprocess.PIPE, check=True).stdout


class Kernel(NamedTuple):
    """Linux as it lies in memory from `start` on, and where to enter it."""

    start: int
    image: bytes
    entry: int


def kernel(elf: bytes) -> Kernel:
    """The segments of an uncompressed kernel, and the entry in its note of type 18 of Xen."""
    (table,), (number,) = struct.unpack_from("<Q", elf, 32), struct.unpack_from("<H", elf, 56)
    segments, entry = [], 0
    for i in range(number):
        kind, _, offset, _, place, size, _, _ = struct.unpack_from("<IIQQQQQQ", elf, table + 56 * i)
        if kind == 1:
            segments.append((place, elf[offset : offset + size]))
        if kind == 4:
            entry = entry or note(elf[offset : offset + size])
    start, end = min(place for place, _ in segments), max(place + len(data) for place, data in segments)
    image = bytearray(end - start)
    for place, data in segments:
        image[place - start : place - start + len(data)] = data
    if not entry:
        raise ValueError("this Linux has no entry for PVH")
    return Kernel(start, bytes(image), entry)


def note(notes: bytes) -> int:
    """The entry for PVH, or 0."""
    at = 0
    while at < len(notes):
        name, size, kind = struct.unpack_from("<III", notes, at)
        begin = at + 12 + (name + 3) // 4 * 4
        if kind == 18 and notes[at + 12 : at + 12 + name] == b"Xen\0":
            return int.from_bytes(notes[begin : begin + size], "little")
        at = begin + (size + 3) // 4 * 4
    return 0


def firmware(entry: int, description: int, first: int, last: int) -> bytes:
    """64 KiB in the place of the BIOS: into 32 bits, one read of each block of memory in order, and into Linux."""
    word = struct.Struct("<I").pack
    begin = b"\xfa\xb0\x02\xe6\x92"  # cli; address line 20 on: mov al, 2; out 0x92, al
    begin += b"\x2e\x66\x0f\x01\x16\x20\x01"  # lgdt cs:[0x120]
    begin += b"\x0f\x20\xc0\x0c\x01\x0f\x22\xc0"  # mov eax, cr0; or al, 1; mov cr0, eax
    begin += b"\x66\xea" + word(BIOS + 0x40) + b"\x08\0"  # jmp 8:BIOS + 0x40
    protected = b"\x66\xb8\x10\0\x8e\xd8\x8e\xc0\x8e\xd0"  # mov ax, 16; mov ds, ax; mov es, ax; mov ss, ax
    protected += b"\xbe" + word(first)  # mov esi, first
    # mov al, [esi]; add esi, BLOCK; cmp esi, last; jb to the first of these
    protected += b"\x8a\x06\x81\xc6" + word(BLOCK) + b"\x81\xfe" + word(last) + b"\x72\xf0"
    protected += b"\xbb" + word(description) + b"\xb8" + word(entry) + b"\xff\xe0"  # mov ebx, description; mov eax, entry; jmp eax
    segments = struct.pack("<QQQ", 0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF)  # none, code and data of all addresses
    table = struct.pack("<HI", len(segments) - 1, BIOS + 0x100)
    image = bytearray(64 << 10)
    for at, part in ((0, begin), (0x40, protected), (0x100, segments), (0x120, table), (0xFFF0, b"\xe9\x0d\0")):  # jmp 0
        image[at : at + len(part)] = part
    return bytes(image)


def archive(files: dict[str, tuple[int, bytes]]) -> bytes:
    """Files by name, with their modes, as cpio's "newc"; the one device is the console."""
    out = b""
    for number, (name, (mode, data)) in enumerate({**files, "TRAILER!!!": (0, b"")}.items(), 1):
        device = (5, 1) if name == "dev/console" else (0, 0)
        fields = number, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(name) + 1, 0
        for part in (b"070701" + b"".join(b"%08X" % x for x in fields) + name.encode() + b"\0", data):
            out += part + b"\0" * (-len(part) % 4)
    return out


def describe(place: int, files: int, size: int) -> bytes:
    """A page at `place` that tells Linux (hvm_start_info) of its command line, its memory and its initial files."""
    modules, ranges, words = (place + at for at in (0x100, 0x200, 0x400))
    page = bytearray(PAGE)
    for at, part in (
        (0, struct.pack("<IIIIQQQQII", 0x336EC578, 1, 0, 1, modules, words, 0, ranges, 2, 0)),
        (0x100, struct.pack("<QQQQ", files, size, 0, 0)),
        (0x200, struct.pack("<QQIIQQII", 0, 0x9F000, 1, 0, 1 << 20, MEMORY - (1 << 20), 1, 0)),
        (0x400, COMMAND_LINE.encode() + b"\0"),
    ):
        page[at : at + len(part)] = part
    return bytes(page)


def write_parts(folder: Path, linux: Kernel, files: bytes) -> None:
    """What the computer is made of, and what Bochs reads about it."""
    description = (linux.start + len(linux.image) + ALIGNED - 1) // ALIGNED * ALIGNED
    place = description + PAGE
    image = linux.image.ljust(description - linux.start, b"\0") + describe(description, place, len(files)) + files
    parts = {
        "memory": image,
        "bios": firmware(linux.entry, description, linux.start, linux.start + len(image)),
        "screen": b"\x55\xaa\x01".ljust(SECTOR, b"\0"),  # a graphics card's program, which Bochs requires, and nothing runs
        "disk": b"",
    }
    for name, data in parts.items():
        Path(folder, name).write_bytes(data)
    with Path(folder, "disk").open("r+b") as disk:
        disk.truncate(DISK)
    Path(folder, "settings").write_text(f"""
cpu: model=sapphire_rapids, count=1, ips=50000000, ignore_bad_msrs=1
memory: guest={MEMORY >> 20}, host={MEMORY >> 20}
romimage: file={folder}/bios
vgaromimage: file={folder}/screen
optramimage1: file={folder}/memory, address={linux.start:#x}
ata0-master: type=disk, path={folder}/disk, mode=flat, cylinders=0
com1: enabled=1, mode=file, dev={folder}/console
pci: enabled=0
display_library: rfb, options="timeout=0, no_gui_console"
plugin_ctrl: speaker=false
log: {folder}/log
panic: action=fatal
""")


class Machine:
    """The running computer, and its calls."""

    def __init__(self, system: System, folder: Path) -> None:
        self._folder, self._number = folder, 1
        with Path(folder, "disk").open("r+b") as disk, Path(folder, "out").open("wb") as out:
            self._disk = mmap.mmap(disk.fileno(), 0)
            command = system.command("bochs-bin", "-q", "-f", str(folder / "settings"))
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=system.environment
            )

    def answer(self) -> int:
        """To the latest call; the first tells the best target. Raises RuntimeError where the computer has ended."""
        while True:
            number, value = struct.unpack_from("<Qq", self._disk, SECTOR)
            if number == self._number:
                return int(value)
            if number == LOST:
                raise RuntimeError(f"the kernels' program ended{f' by signal {value}' if value else ''}")
            if self._process.poll() is not None:
                said = (Path(self._folder, name) for name in ("console", "out"))
                ends = [file.read_text(errors="replace")[-2000:] for file in said if file.exists()]
                raise RuntimeError("\n".join(["the emulated computer ended", *ends]))
            time.sleep(0.0005)

    def call(self, line: str) -> int:
        """A line of emulated.py, whose third word is the file that the kernels work on."""
        name, target, path, *rest = line.split()
        with Path(path).open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
            words = " ".join((name, target, "/call", *rest)).encode() + b"\n\0"
            begin = (LINE_AT + LINE_SECTORS) * SECTOR
            if len(words) > LINE_SECTORS * SECTOR or begin + len(memory) > DISK:
                raise RuntimeError(f"the emulated computer's disk has no space for a call of {len(words)} and {len(memory)} bytes")
            self._disk[LINE_AT * SECTOR : LINE_AT * SECTOR + len(words)] = words
            self._disk[begin : begin + len(memory)] = memory[:]
            self._number += 1
            struct.pack_into("<Q", self._disk, 8, len(memory))
            struct.pack_into("<Q", self._disk, 0, self._number)  # last: the computer looks for it
            value = self.answer()
            memory[:] = self._disk[begin : begin + len(memory)]
        return value

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


def main(folder_of_system: str, init: str, kernels: str, calls: IO[str]) -> None:
    system = System(Path(folder_of_system))
    programs = {"init": (0o100755, Path(init).read_bytes()), "kernels": (0o100755, Path(kernels).read_bytes())}
    files = archive({"dev": (0o40755, b""), "dev/console": (0o20600, b""), **programs})
    with tempfile.TemporaryDirectory() as folder:
        write_parts(Path(folder), kernel(system.linux()), files)
        machine = Machine(system, Path(folder))
        try:
            print(machine.answer(), flush=True)
            for line in calls:
                print(machine.call(line), flush=True)
        finally:
            machine.stop()


def terminate(*_: object) -> None:
    """So that the emulator ends, too."""
    sys.exit(1)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, terminate)
    main(*sys.argv[1:], calls=sys.stdin)  # type: ignore[misc]

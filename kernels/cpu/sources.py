"""The fingerprint of the C++ sources: compiled into the library, and compared with the sources next to it when it is loaded.

Standard library only, because the build runs it, too: `python kernels/cpu/sources.py` prints the fingerprint.
"""

import hashlib
from pathlib import Path

ENDINGS = (".cpp", ".h")


def fingerprint(folder: Path, endings: tuple[str, ...] = ENDINGS) -> str:
    """SHA-256 of the names and contents of a folder's files with these endings, as 16 hexadecimal digits; line ends of Windows count as
    others."""
    digest = hashlib.sha256()
    for file in sorted(file for file in folder.iterdir() if file.suffix in endings):
        content = file.read_bytes().replace(b"\r\n", b"\n")
        digest.update(f"{file.name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    print(fingerprint(Path(__file__).parent))

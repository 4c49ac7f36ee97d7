"""What files are, by their suffixes and by their first bytes."""

import os
from collections.abc import Iterable, Mapping

JPEG_SUFFIXES = frozenset((".jpg", ".jpeg", ".jfif", ".jpe", ".jif", ".mpo"))
IMAGE_SUFFIXES = JPEG_SUFFIXES | frozenset(
    (".png", ".apng", ".bmp", ".dib", ".webp", ".gif", ".tif", ".tiff")
    + (".ppm", ".pgm", ".pbm", ".pnm")
)
_CONVERT = "convert to JPEG, for instance by `magick mogrify -format jpg FILES`"
_ADVICE = {
    (".heic", ".heif", ".hif", ".avif"): f"HEIC and AVIF photographs are not read: {_CONVERT}",
    (".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".jp2", ".jxl", ".tga"): (
        f"raw photographs and other formats are not read: {_CONVERT}"
    ),
    (".dcm", ".dicom"): "DICOM files are not read: convert to PNG of 16 bits, and see data.white",
    (".mov", ".mp4", ".m4v", ".avi", ".mkv", ".webm", ".3gp", ".mpg", ".mts"): (
        "of videos, take single frames (`ffmpeg -i VIDEO -r 1 FRAME%05d.jpg`)"
    ),
    (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar"): (
        "archives inside are not opened: unpack them, or name a .zip itself (folder:NAME.zip)"
    ),
    (".npz", ".npy"): "arrays are read by arrays:PATH, which names an .npz file",
}
_SHOWN = 8  # suffixes in a message

_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_UNPACK = "; unpack it, and name the folder (folder:PATH)"
_SAVE = "make an .npz of it by `np.savez('NAME.npz', x=np.load('NAME.npy'))`"
# First bytes, where in the file they stand, what they show, and what to do.
_MAGIC = (
    (b"\xff\xd8\xff", 0, "a JPEG image"),
    (b"\x89PNG", 0, "a PNG image"),
    (b"GIF8", 0, "a GIF image"),
    (b"II*\0", 0, "a TIFF image"),
    (b"MM\0*", 0, "a TIFF image"),
    (b"PK\x03\x04", 0, "a .zip archive"),
    (b"PK\x05\x06", 0, "an empty .zip archive"),
    (b"\x1f\x8b", 0, f"compressed by gzip, as .tar.gz files are{_UNPACK}"),
    (b"ustar", 257, f"a .tar archive{_UNPACK}"),
    (b"7z\xbc\xaf\x27\x1c", 0, f"a .7z archive{_UNPACK}"),
    (b"Rar!", 0, f"a .rar archive{_UNPACK}"),
    (b"BZh", 0, f"compressed by bzip2{_UNPACK}"),
    (b"\xfd7zXZ\0", 0, f"compressed by xz{_UNPACK}"),
    (b"\x28\xb5\x2f\xfd", 0, f"compressed by zstd{_UNPACK}"),
    (b"\x93NUMPY", 0, f"a single array, as .npy files are; {_SAVE}"),
    *((bytes((0x80, n)), 0, "a Python pickle; make an .npz of its arrays") for n in range(2, 6)),
    (b"\x89HDF\r\n", 0, "an HDF5 file; make an .npz of its arrays"),
    (b"%PDF", 0, "a PDF document"),
    (b"version https://git-lfs", 0, "a pointer of Git LFS; get the file by `git lfs pull`"),
    *((b"ftyp" + kind, 4, f"a HEIC photograph; {_CONVERT}") for kind in _HEIC_BRANDS),
    *((b"ftyp" + kind, 4, "a video") for kind in (b"isom", b"qt", b"mp4", b"M4V", b"avc1")),
)
_MARKUP = (b"<!doctype html", b"<html", b"<?xml", b"<svg")
HEAD = 512  # bytes that `kind_of` looks at


def suffix_of(name: str) -> str:
    """Return the suffix of a file's name in lower case, with its dot; "" without one."""
    dot = name.rfind(".")
    return name[dot:].lower() if dot > 0 else ""


def kind_of(data: bytes) -> str:
    """Return what a file is by its first bytes and what to do, the end of a sentence "it is ...".

    A kind that is not known is described by these bytes.
    """
    for magic, place, kind in _MAGIC:
        if data[place : place + len(magic)] == magic:
            return kind
    if not data:
        return "empty"
    if data.lstrip().lower().startswith(_MARKUP):
        return (
            f"markup, as web pages are (it begins with {_begin(data.lstrip())}); download it again"
        )
    return f"of no known kind (it begins with {_begin(data)})"


def kind_of_file(path: str | os.PathLike[str]) -> str:
    """Return what a file is by its first bytes, see `kind_of`.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        return kind_of(file.read(HEAD))


def _begin(data: bytes) -> str:
    return repr(data[:16].decode()) if data[:16].isascii() else repr(data[:16])


def count_text(counts: Mapping[str, int]) -> str:
    """Return numbers of files by suffix, the most frequent first, such as "12 .txt, 1 .md"."""
    order = sorted(counts, key=lambda suffix: (-counts[suffix], suffix))
    parts = [f"{counts[suffix]:,} {suffix or 'without a suffix'}" for suffix in order[:_SHOWN]]
    if rest := sum(counts[suffix] for suffix in order[_SHOWN:]):
        parts.append(f"{rest:,} of other suffixes")
    return ", ".join(parts)


def advice(suffixes: Iterable[str]) -> str:
    """Return what to do about files that are left out; "" where nothing is known."""
    there = set(suffixes)
    return "; ".join(text for group, text in _ADVICE.items() if there.intersection(group))


def is_split_zip(path: str | os.PathLike[str]) -> bool:
    """Return whether a file is the last part of a .zip that was split, by its end record."""
    with open(path, "rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - 2**16 - 22))
        tail = file.read()
    end = tail[tail.rfind(b"PK\x05\x06") :]  # its bytes 4 and 5: number of this part; 20: a comment
    complete = len(end) >= 22 and len(end) == 22 + int.from_bytes(end[20:22], "little")
    return complete and end[4:6] not in (b"\0\0", b"\xff\xff")

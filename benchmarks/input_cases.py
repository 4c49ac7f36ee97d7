"""Random folders, zips and array files as people have them, for ``fuzz_input.py``."""

import gzip
import io
import os
import random
import struct
import unicodedata
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import plain_reading
from PIL import Image, PngImagePlugin
from plain_reading import Reading

TRAINED = 10  # the seeds of cases that train are multiples of this
RECORDS = (24, 12)  # for training and testing in these cases, so that few programs compile
SIZE = (5, 6)

FORMATS = {"jpg": "JPEG", "jpeg": "JPEG", "jfif": "JPEG", "tif": "TIFF", "png": "PNG", "bmp": "BMP"}
SUFFIXES = ["jpg", "jpg", "JPG", "jpeg", "JPEG", "jfif", "png", "PNG", "bmp", "tif"]
OTHERS = ["heic", "HEIC", "mp4", "txt", "csv", "zip", "npz"]
SYSTEM = (
    "@eaDir",
    "#recycle",
    "$RECYCLE.BIN",
    "__MACOSX",
    "lost+found",
    "System Volume Information",
)
CLASSES = (
    *("cat", "dog", "café", "n01440764", "Straße", "7", "zebra finch", "Ärger"),
    *("test_tube", "evaluation", "100 %s {root}"),
)
WRAPPERS = ("data", "archive (1)", "ILSVRC", "train_data", "Test", "{} %d")
TRAIN = ("train", "training", "trainset", "trainval")
TEST = ("test", "testing", "testset", "val", "valid", "validation", "valset", "dev", "evaluation")
BEFORE = ("", "", "", "seg_", "mnist-", "ILSVRC2012_img_")
AFTER = ("", "", "", "_set", "Set", "_images", "2017", "1", " (2)")
BESIDE = ("devkit", "unlabeled", "extra", "TRAIN", "train_b", "Test", "validation", "train_val")
TOPS = (
    *CLASSES,
    "train",
    "Training",
    "test",
    "val",
    "seg_train",
    "seg_test",
    "unlabeled",
    "train_val",
)
SPELLINGS = ("./{}", ".//{}", "q/../{}", "./././{}")
ESCAPES = ("../{}", "/{}", "C:\\{}", "a/../../{}", "\\{}", "./../{}")
WRONG = {
    "html": b"<!DOCTYPE html><html><body>404</body></html>",
    "gzip": gzip.compress(bytes(600)),
    "tar": b"a.jpg".ljust(257, b"\0") + b"ustar\0" + bytes(1400),
    "array": b"\x93NUMPY\x01\0v\0{'descr': '|u1', 'fortran_order': False, 'shape': (4,), }\n1234",
    "half a zip": b"PK\x03\x04" + bytes(80),
    "empty zip": b"PK\x05\x06" + bytes(18),
    "nothing": b"",
}
LABELS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "from 0": lambda k: k,
    "from 1": lambda k: k + 1,
    "sparse": lambda k: 100_000 * k,
    "far": lambda k: k + 2**40,
    "with -1": lambda k: k - 1,
    "below -1": lambda k: k - 2,
    "none": lambda k: k * 0 - 1,
    "bytes": lambda k: (k * 80).astype(np.uint8),
    "fractions": lambda k: k / 2,
}
IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte")
IDX = (*IDX, "t10k-labels-idx1-ubyte")


class Item(NamedTuple):
    """A file: its bytes, and the colour that all its pixels have; None if it is broken."""

    data: bytes
    colour: tuple[int, ...] | None = None


def picture(number: int, suffix: str, kind: str = "plain") -> Item:
    """Return an image file of one colour, by which it is known again."""
    colour = tuple(number * step % 256 for step in (37, 91, 53))
    image, options = Image.new("RGB", SIZE[::-1], colour), {}
    form = FORMATS[suffix.lower()]
    if kind == "deep" and form in ("PNG", "TIFF"):
        colour = colour[:1] * 3
        image = Image.fromarray(np.full(SIZE, colour[0] * 257, np.uint16))
    if kind == "text" and form == "PNG":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_text("notes", "x" * 2_000_000, zip=True)
    file = io.BytesIO()
    image.save(file, form, **options)
    data = file.getvalue()
    return Item(data, colour) if kind != "broken" else Item(data[: number % 2 * len(data) // 2])


class Case:
    """One input and what may be read of it; the same whenever it is made.

    Attributes:
        source: the specification that is opened.
        allowed: the readings of it; None is a refusal.
        records: the files or arrays that are read, by name.
        files: of a tree or zip, by path below its root.
        locked: folders that cannot be listed.
        scored: there are probes.
        stated: what the log of a start has if it is read.
        kinds: what it is made of.
    """

    def __init__(self, seed: int, root: Path):
        """Draw a case and write it.

        Args:
            seed: of everything that is drawn.
            root: its folder, or its file without the suffix; its parent exists and is empty.
        """
        self.seed, self.root = seed, root
        self.rng = random.Random(seed)
        self.records: dict[str, Item] | dict[str, np.ndarray] = {}
        self.files: dict[str, Item] = {}
        self.locked: list[str] = []
        self.stated: set[str] = set()
        self.kinds: list[str] = []
        self.allowed: list[Reading | None] = [None]
        self.scored = not self.chance("no probes", 0.1)
        self.source = f"folder:{root}"
        {"tree": self.tree, "zip": self.zip, "arrays": self.arrays, "wrong": self.wrong}[
            self.pick(tree=9, zip=6, arrays=4, wrong=1)
        ]()

    def __str__(self) -> str:
        lines = [f"seed {self.seed}, {self.source}: {', '.join(self.kinds)}"]
        lines += [f"    {path!r}" for path in sorted(self.files)[:60]]
        return "\n".join([*lines, *(f"    {folder!r} cannot be listed" for folder in self.locked)])

    def pick(self, **weights: float) -> str:
        """Draw one of several kinds."""
        [kind] = self.rng.choices([*weights], [*weights.values()])
        self.kinds.append(kind)
        return kind

    def chance(self, kind: str, share: float) -> bool:
        """Draw whether a kind occurs."""
        found = self.rng.random() < share
        self.kinds += [kind] * found
        return found

    def add(self, folder: str, count: int = 0) -> None:
        """Add images to a folder."""
        for _ in range(count or self.rng.randint(1, 4)):
            number, suffix = len(self.files), self.rng.choice(SUFFIXES)
            [kind] = self.rng.choices(("plain", "deep", "text", "broken"), (60, 3, 3, 0.3))
            name = f"{self.rng.choice(('', 'IMG_', 'cat.', 'É'))}{number}.{suffix}"
            self.files[folder + name] = picture(number, suffix, kind)

    def spelled(self, name: str) -> str:
        """Return a class's name as another program or person may write it."""
        change = self.rng.choice((str.upper, str.title)) if self.rng.random() < 0.1 else str
        return unicodedata.normalize(self.rng.choice(("NFC", "NFD")), change(name))

    def split_name(self, words: tuple[str, ...], before: str, after: str) -> str:
        """Return a usual name of a split."""
        word = self.rng.choice((str, str, str.title, str.upper))(self.rng.choice(words))
        return before + word + after

    def fill(self, top: str, classes: list[str], **weights: float) -> None:
        """Fill a folder with images in one of several ways."""
        usual = {"classes": 20, "flat": 1, "images": 1, "again": 1.5, "mixed": 0.5, "photos": 0.5}
        kind = self.pick(**(weights or usual))
        inner = {"again": top.split("/")[-2], "images": "images", "photos": "photos"}.get(kind)
        top += f"{inner}/" if inner else ""
        if kind in ("flat", "images", "mixed"):
            self.add(top, 1 if kind == "mixed" else 0)
        if kind in ("flat", "images"):
            return
        for name in classes:
            for _ in range(1 + (self.rng.random() < 0.02)):  # the second one in another spelling
                deeper = self.rng.choice(("", "", "", "", "", "images/", "x/y/"))
                self.add(f"{top}{self.spelled(name)}/{deeper}")

    def draw_layout(self) -> None:
        """Draw the images of a tree."""
        rng = self.rng
        classes = rng.sample(CLASSES, rng.choice((1, 2, 2, 3, 3, 4)))
        if self.chance("classes that differ in case", 0.04):
            classes += [classes[0].swapcase()]
        if "tree" in self.kinds and self.chance("name that is not UTF-8", 0.03):
            classes += ["caf\udce9"]
        root = "".join(rng.choice(WRAPPERS) + "/" for _ in range(rng.choice((0, 0, 0, 1, 2))))
        kind = self.pick(splits=50, no_splits=20, one_split=6, odd=16, tiny=6)
        style = rng.choice(BEFORE), rng.choice(AFTER)
        if kind == "splits":
            tops = [self.split_name(TRAIN, *style), self.split_name(TEST, *style)]
            if self.chance("three splits", 0.2):
                tops.append(self.split_name(TEST, *style))
            if self.chance("splits in different styles", 0.06):
                tops[1] = self.split_name(TEST, rng.choice(BEFORE), rng.choice(AFTER))
            if self.chance("folders beside splits", 0.1):
                tops.append(rng.choice(BESIDE))
            for number, top in enumerate(dict.fromkeys(tops)):
                some = rng.sample(classes, rng.randint(1, len(classes))) if number else classes
                if number and self.chance("class without training images", 0.03):
                    some = [*some, "frog"]
                flat = {"flat": 1, "images": 1} if rng.random() < 0.05 + 0.3 * (number > 0) else {}
                self.fill(f"{root}{top}/", some, **flat)
        elif kind == "tiny":
            for name in classes:
                self.add(f"{root}train/{name}/images/")
            self.add(f"{root}val/images/", RECORDS[1])
            self.add(f"{root}test/images/")
            lines = (f"{p.split('/')[-1]}\t{rng.choice(classes)}\t0\t0\t5\t4\n" for p in self.files)
            notes = "".join(lines).encode("utf-8", "surrogateescape")
            self.files[f"{root}val/val_annotations.txt"] = Item(notes)
        elif kind == "odd":
            for top in rng.sample(TOPS, rng.randint(1, 4)):
                for split in ("train/", "test/") if self.chance("splits below", 0.1) else ("",):
                    self.fill(f"{root}{top}/{split}", classes)
        else:
            top = rng.choice(("train", "TEST", "val2017")) + "/" if kind == "one_split" else ""
            self.fill(root + top or "x/", classes)

    def litter(self) -> None:
        """Add what lies beside images."""
        rng = self.rng
        folders = [path.split("/")[:-1] for path in self.files]
        places = sorted({"/".join([*f[:k], ""]) for f in folders for k in range(1, len(f) + 1)})
        places += [""] * len(places)
        if self.chance("system folder", 0.25):
            name = rng.choice(SYSTEM)
            self.add(f"{rng.choice(places)}{name}/{rng.choice(('', 'a/', 'train/'))}")
            self.stated.add(name)
        if self.chance("hidden", 0.15):
            self.add(f"{rng.choice(places)}.Trash-1000/")
            self.files[f"{rng.choice(places)}._1.jpg"] = Item(b"AppleDouble")
        if self.chance("other suffixes", 0.4):
            suffix = rng.choice(OTHERS)
            self.files[f"{rng.choice(places)}a.{suffix}"] = Item(b"no image")
            self.stated.add(f".{suffix.lower()}")
        if self.chance("loose image", 0.03):
            self.add(rng.choice(places), 1)
        if self.chance("folder without images", 0.1):
            self.files[f"{rng.choice(places)}testing/readme.md"] = Item(b"")

    def read(self) -> list[Reading | None]:
        """Return what a plain reading of the files gives."""
        notes = (item.data for path, item in self.files.items() if "val_annotations" in path)
        text = next(notes, b"").decode("utf-8", "surrogateescape")
        return plain_reading.of_tree(self.files, self.locked, text, scored=self.scored)

    def draw_files(self) -> None:
        """Draw the files of a tree or zip, and read them."""
        self.draw_layout()
        self.litter()
        for _ in range(sum(RECORDS) * (self.seed % TRAINED == 0 and "tiny" not in self.kinds)):
            for reading in filter(None, self.read()[:1]):
                for part, count in zip(reading[:2], RECORDS, strict=True):
                    if len(part) < count and (part is not reading.test or reading.splits):
                        self.add(next(iter(part)).rpartition("/")[0].lstrip("/") + "/", 1)
        self.allowed, self.records = self.read(), self.files

    def tree(self) -> None:
        """Write a tree."""
        self.draw_files()
        for path, item in self.files.items():
            place = self.root / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(item.data)
        seen = [path for path in self.files if "/" in path and "/." not in f"/{path}"]
        if seen and self.chance("folder that cannot be listed", 0.05):
            place = self.rng.choice(("", "", self.rng.choice(seen).rpartition("/")[0] + "/"))
            self.locked = [f"{place}locked/"]
            self.allowed = self.read()
            (self.root / self.locked[0]).mkdir()
            if not {*map(str.lower, place.split("/"))} & {*plain_reading.SYSTEM}:
                self.stated.add("locked")
        elif seen and self.chance("linked folder", 0.05):
            place = self.root / self.rng.choice(seen).split("/")[0]
            place.rename(self.root.with_name("elsewhere"))
            place.symlink_to(self.root.with_name("elsewhere"))
        elif self.chance("link to the root", 0.03):
            (self.root / "again").symlink_to(self.root)
        elif self.chance("link that leads nowhere", 0.03):
            (self.root / "dead.jpg").symlink_to(self.root / "gone.jpg")
            self.stated.add("broken link")

    def zip(self) -> None:
        """Write a zip whose members have the names that other programs give them."""
        self.draw_files()
        self.source += ".zip"
        spelling = self.rng.choice(SPELLINGS) if self.chance("spelled names", 0.3) else "{}"
        backslashes = self.chance("backslashes", 0.15)
        members: list[tuple[str, bytes]] = []
        for path, item in self.files.items():
            if self.chance("member twice", 0.01):
                members.append((path, picture(200 + len(members), "png").data))
                self.stated.add("have the name of a later one")
            name = spelling.format(path)
            members.append((name.replace("/", "\\") if backslashes else name, item.data))
        if self.chance("member outside", 0.04):
            members.append((self.rng.choice(ESCAPES).format("1.jpg"), b""))
            self.allowed = [None]
        with zipfile.ZipFile(f"{self.root}.zip", "w", self.rng.choice((0, 8))) as file:
            warnings.filterwarnings("ignore", "Duplicate name")
            if self.chance("members for folders", 0.3):
                file.writestr("train/", b"")
            for name, data in members:
                file.writestr(zipfile.ZipInfo(name), data, file.compression)
        if self.chance("cut off", 0.02):
            os.truncate(f"{self.root}.zip", os.path.getsize(f"{self.root}.zip") - 30)
            self.allowed = [None]

    def arrays(self) -> None:
        """Write an .npz, or a folder of idx files, with labels of some kind."""
        rng, classes = np.random.default_rng(self.seed), self.rng.randint(1, 4)
        kind = self.pick(**dict.fromkeys(LABELS, 1.0))
        idx = kind in ("from 0", "from 1", "bytes") and self.chance("idx", 0.4)
        keys = IDX if idx else self.rng.choice(plain_reading.ARRAYS)
        shape = self.rng.choice((SIZE, SIZE, *((*SIZE, channels) for channels in (1, 2, 3, 4))))
        counts = self.rng.choices(range(2, 30), k=2) if self.seed % TRAINED else RECORDS
        dtype = "f4" if not idx and self.chance("fractions as images", 0.05) else "u1"
        arrays: dict[str, np.ndarray] = {}
        for x, y, count in zip(keys[::2], keys[1::2], counts, strict=True):
            if not x or (arrays and self.chance("no test arrays", 0.1)):
                continue
            labels = LABELS[kind](np.arange(classes))[rng.integers(0, classes, count)]
            if arrays and self.chance("label of the test split only", 0.05):
                labels[0] = 77
            if labels.dtype.kind == "i" and not idx and self.chance("some without a label", 0.1):
                labels[rng.random(count) < 0.3] = -1
            arrays[x] = rng.integers(0, 256, (count, *(SIZE if idx else shape))).astype(dtype)
            if not self.chance("no labels", 0.1):
                arrays[y] = labels[: count - self.chance("a label too few", 0.02)]
        self.allowed = plain_reading.of_arrays(arrays, keys, scored=self.scored)
        self.records = {f"{x}[{i}]": a for x in arrays for i, a in enumerate(arrays[x])}
        if idx:
            self.source = f"arrays:{self.root}"
            self.root.mkdir()
            for key, array in arrays.items():
                head = struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape)
                data = head + array.astype(np.uint8).tobytes()
                (self.root / key).write_bytes(data)
            return
        self.source = f"arrays:{self.root}.npz"
        if self.chance("other arrays", 0.1):
            arrays["paths"] = np.arange(3)
            self.stated.add("paths")
        np.savez(f"{self.root}.npz", **arrays)

    def wrong(self) -> None:
        """Write a file that is not what its name says, or nothing."""
        kind = self.pick(**dict.fromkeys((*WRONG, "no file"), 1.0))
        names = (
            "folder:{}.zip",
            "arrays:{}.npz",
            "folder:{}.tar",
            "arrays:{}.zip",
            "folder:{}.jpg",
        )
        self.source = self.rng.choice(names).format(self.root)
        if kind in WRONG:
            Path(self.source.partition(":")[2]).write_bytes(WRONG[kind])

"""Fingerprints never change: with another one nobody's run goes on."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from sample_files import (
    example,
    images,
    npz,
    write_data_set,
    write_idx_folder,
    write_shard,
    zip_tree,
)

from nat_jax.input.sources import file_listing, index_cache, open_source
from nat_jax.input.sources.source import split_positions

# Trees of files whose sizes are the squares of their positions.
TREES = {
    "splits": (
        ["train/b/1.jpg", "train/b/2.png", "train/b-c/1.jpg", "train/b/2/0.jpg"]
        + ["train/b/10.JPEG", "train/a/é.jpg", "train/a/日本.webp", "val/b/1.jpg"]
        + ["val/new/0.gif", "outside/x/0.jpg", "train/b/notes.txt", "train/.git/0.jpg"],
        "d21670db832b87d2e09ff3b5f9fcb3cbe38d1c4889ecabb020d52e1040d78a99",
        "22b2134b4f8e7a00f91ba36c0e1881c52fda71070ebaea0007d73641dc74df71",
    ),
    "classes": (
        [f"deep/er/{c}/{i}.jpg" for c in ("cat", "ant.x", "ant") for i in range(7)]
        + ["deep/er/ant/x/1.jpg"],
        "114ba98938a60d77d3e583dac4e4826d49e0353e2e8575292bc2df638a436203",
        "75be3b4a0f19416a087aea7e7763c5843b057c5ca84763d3263e8262cb6ccd69",
    ),
    "flat": (
        [f"{i}.ppm" for i in range(23)] + ["readme"],
        "8bb6f64d5490fe31ab2386d9166968f4c004c3d4746dad9ec1412eeb620fc0ae",
        "efaf3bc652a6f94465f1bb9c457692815736b449198574413a9bbdf52a5f0b42",
    ),
}
PREPARED = {
    "": ["bedee50f97752d486f673fdeb67425a2edbe3c2c314991503e981fdb9eb43d49"]
    + ["058ff6b5395b0c9467ad698a72aa3b6158ffd71a1bdef0842f3f7e22fa995462"],
    "/*train*": ["b6bb7965213e136ab6eecfc52aef0b55bd22d258bfa7f927e5cbc97752aafce3"]
    + ["781c835ac8ec5812e1e2ee43200bb54dd3f851d73755525601edd13c36d7455e"],
}
SPLITS = ("train", "test")


def fingerprints(spec: str) -> list[str]:
    return [open_source(spec, split).fingerprint for split in SPLITS]


@pytest.mark.parametrize("kind", TREES)
@pytest.mark.parametrize("archived", [False, True])
def test_folders_and_zips(kind: str, archived: bool, tmp_path: Path, monkeypatch):
    files, *wanted = TREES[kind]
    root = tmp_path / "data"
    for position, name in enumerate(files):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(position**2))
    spec = f"folder:{zip_tree(root, tmp_path / 'data.zip') if archived else root}"
    monkeypatch.setattr(index_cache, "KEPT_FROM", 1)
    monkeypatch.setattr(file_listing, "SETTLED_NS", 0)
    for _ in range(2):  # as listed, and as kept
        index_cache._recent.clear()
        assert fingerprints(spec) == wanted
    assert list((tmp_path / ".cache").rglob("*"))
    with (root / files[0]).open("ab") as file:
        file.write(b"\0")
    shutil.rmtree(tmp_path / ".cache", ignore_errors=True)
    index_cache._recent.clear()
    assert fingerprints(f"folder:{root}")[0] != wanted[0]


def test_arrays(tmp_path: Path):
    assert fingerprints("digits") == [
        "c80596d15279e60f0f855e983bee599e4cfa99279ceb1d03bf548c56dfc5ecf6",
        "73b51a8f8d934f9f5d85d32f0767d4a61d9ddb0bcc09a26ba9a20728937a171c",
    ]
    assert open_source("digits", per_class=3).fingerprint == (
        "d2f0c29c13087b216625d5f91e155e7edc7124d4c56fd114eaf3d528625c781b"
    )
    spec = npz(tmp_path / "a.npz", x=images(30, 4, 4), y=np.arange(30) % 3)
    assert fingerprints(spec) == [
        "b5bdad11ebf16f08806c5c915a0b10acb36d63b2e3859abffe6a60c8e5839b1a",
        "1b8e27f6a99758c575398acc1f3d57d9a244f9e96d0aeaa0ea59fffd8d141b3d",
    ]
    assert fingerprints(write_idx_folder(tmp_path / "idx")) == [
        "25a94048a7ca80bb3bbc4aa913362d4530571cf8f238f49ebba92305cb8cf870",
        "1dc7d30c55b691ccbfabe6c5ce8b0598d8d28445ee1ce9d72af6bd47cc8ee686",
    ]


def record(split: int, number: int) -> bytes:
    return example(image=b"\xff\xd8\xff" + bytes([split, number]), label=number % 2)


@pytest.mark.parametrize("pattern", PREPARED)
def test_prepared_data_sets(pattern: str, tmp_path: Path):
    train = [[record(0, i) for i in range(6)], [record(1, i) for i in range(5)]]
    splits = {"train": train, "validation": [[record(2, i) for i in range(3)]]}
    folder = write_data_set(tmp_path / "d", splits)
    assert fingerprints(f"arrayrecord:{folder}{pattern}") == PREPARED[pattern]


def test_prepared_data_sets_by_name(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    for name, config, version, splits in (
        ("fixed", "", "1.2.3", {"train": [3, 2], "validation": [2]}),
        ("other", "left", "2.0.0", {"train": [2], "test": [1]}),
    ):
        records = {k: [[record(0, i) for i in range(n)] for n in v] for k, v in splits.items()}
        folder = tmp_path / name / config / version
        write_data_set(folder, records, name=name, config=config, version=version)
    assert fingerprints("tfds:fixed") == [
        "a640662aef9e4bfa25af826f9d92b9e6ecc8edc62b1c3ca304aa2da2cbbeb984",
        "3da68858e5acb50f495f05dde9645bfa1fa6a86857b88e4d83111ccab7b08527",
    ]
    assert fingerprints("tfds:other/left") == [
        "fc1043791bf41ce2a4791198743f7f27688d742cce48c9c9db382e69a95501d9",
        "37970736156619a850cc45719c679c1cb5e9e61bee0889110409d1926464baa0",
    ]


@pytest.mark.parametrize("held_out", [False, True])
def test_shards_without_metadata(held_out: bool, tmp_path: Path):
    # How a writer lays out its file is the writer's; the rule over the bytes is ours.
    files = {"train-00000-of-00002": 6, "train-00001-of-00002": 5}
    if not held_out:
        files["val"] = 3
    expected = {}
    for name, count in files.items():
        contents = [b"\xff\xd8\xff" + bytes([count, i]) * 9000 for i in range(count)]
        path = write_shard(tmp_path / f"{name}.array_record", contents)
        data = path.read_bytes()
        assert len(data) > 2**16
        line = f"{path.name}\0{count}\0{len(data)}\n".encode()
        digest = expected.setdefault(name.partition("-")[0], hashlib.sha256())
        digest.update(data[: 2**16] + data[-(2**16) :] + line)
    keys = ["train", "train"] if held_out else ["train", "val"]
    identities = [[expected[key].hexdigest(), key] for key in keys]
    if held_out:
        identities = [[*i, split] for i, split in zip(identities, SPLITS, strict=True)]
    wanted = [hashlib.sha256(json.dumps(i).encode()).hexdigest() for i in identities]
    assert fingerprints(f"arrayrecord:{tmp_path}") == wanted
    assert len(open_source(f"arrayrecord:{tmp_path}", "test")) == (
        len(split_positions(11, "test")) if held_out else 3
    )

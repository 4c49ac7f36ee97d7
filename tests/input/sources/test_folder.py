import io
import logging
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sample_files import SPLIT_TREE, labels, names, write_tree, zip_tree

from nat_jax.errors import InputError
from nat_jax.input.sources import Source, UnreadableRecord, index_cache, open_source


def test_folder_splits_share_one_sorted_list_of_classes(tree: Path):
    (tree / "test/dog/0.jpg").rename(tree / "test/0.tmp")
    write_tree(tree, ["test/bee/0.jpg"])
    train, test = (open_source(f"folder:{tree}", s) for s in ("train", "test"))
    assert train.class_names == test.class_names == ("ant", "bee", "cat", "dog")
    assert labels(train) == [0] * 4 + [2] * 4 + [3] * 4
    assert names(test)[:3] == ["test/ant/0.jpg", "test/ant/1.jpg", "test/bee/0.jpg"]
    assert test[2]["image"] == (tree / "test/bee/0.jpg").read_bytes()


def test_val_stands_in_for_test_and_gives_way_to_it(tree: Path, caplog):
    (tree / "test").rename(tree / "val")
    assert len(open_source(f"folder:{tree}", "test")) == 6
    write_tree(tree, ["test/ant/0.jpg"])
    with caplog.at_level(logging.INFO):
        assert names(open_source(f"folder:{tree}", "test")) == ["test/ant/0.jpg"]
    assert "left out 6 image(s) outside train/ and test/" in caplog.text


def test_spellings_of_splits_and_classes(tmp_path: Path):
    files = ["Training/a/0.jpg", "Training/B/0.jpg", "Testing/A/1.jpg", "Testing/b/2.jpg"]
    root = write_tree(tmp_path, files)
    assert names(open_source(f"folder:{root}")) == sorted(files[:2])
    held_out = open_source(f"folder:{root}", "test")
    assert names(held_out) == files[2:] and labels(held_out) == [1, 0]
    assert held_out.class_names == open_source(f"folder:{root}").class_names == ("B", "a")


@pytest.mark.parametrize("workdir", ["runs/smoke", "runs/suite/seed-0", "."])
def test_pictures_of_a_run_inside_the_folder_are_no_images(tmp_path: Path, workdir: str, caplog):
    caplog.set_level(logging.INFO)
    root = write_tree(tmp_path, [f"{name}/{i}.jpg" for name in ("ant", "pictures") for i in "012"])
    (root / "pictures").rename(root / "cat")
    before = open_source(f"folder:{root}").fingerprint
    write_tree(root / workdir, ["pictures/filters.png", "pictures/neighbours_z.png"])
    assert open_source(f"folder:{root}").fingerprint != before  # it may be a class
    for mark in ("metrics.jsonl", "results/judged/a.json", "results/suite.json"):
        write_tree(root / workdir, [mark])
        source = open_source(f"folder:{root}")
        assert source.fingerprint == before and source.class_names == ("ant", "cat")
        assert f"{(Path(workdir) / 'pictures').as_posix()} (of a run)" in caplog.text
        (root / workdir / mark).unlink()
        if mark.startswith("results/judged"):
            (root / workdir / "results/judged").rmdir()


def test_a_class_may_be_called_train(tmp_path: Path):
    root = write_tree(tmp_path, [f"{name}/{i}.jpg" for name in ("train", "boat") for i in range(9)])
    assert open_source(f"folder:{root}").class_names == ("boat", "train")


def test_which_of_two_links_counts_does_not_depend_on_the_file_system(tmp_path: Path):
    elsewhere = write_tree(tmp_path / "elsewhere", ["0.jpg", "1.jpg", "2.jpg"])
    found = []
    for order in ("pq", "qp"):
        root = write_tree(tmp_path / order, ["a/0.jpg"])
        for link in order:
            (root / link).symlink_to(elsewhere, target_is_directory=True)
        source = open_source(f"folder:{root}")
        found.append((source.class_names, source.fingerprint))
    assert found[0] == found[1] and found[0][0] == ("a", "p")


def test_a_notebook_may_change_its_folder(tmp_path: Path, monkeypatch):
    write_tree(tmp_path / "data", [f"{i}.jpg" for i in range(4)])
    monkeypatch.chdir(tmp_path)
    source = open_source("folder:data")
    (tmp_path / "data" / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "data" / "sub")
    assert source[0]["image"]


def test_class_folders_without_splits_hold_a_tenth_out(tmp_path: Path):
    write_tree(tmp_path, [f"{c}/{i:02d}.jpg" for c in "ab" for i in range(20)])
    train, test = (open_source(f"folder:{tmp_path}", s) for s in ("train", "test"))
    assert (len(train), len(test)) == (36, 4)
    assert train.class_names == test.class_names == ("a", "b")
    everything = sorted(names(train) + names(test))
    assert everything == [f"{c}/{i:02d}.jpg" for c in "ab" for i in range(20)]
    for source in (train, test):
        assert labels(source) == ["ab".index(n[0]) for n in names(source)]


def test_a_flat_folder_is_unlabelled(tmp_path: Path):
    write_tree(tmp_path, [f"{i}.jpg" for i in range(10)])
    train, test = (open_source(f"folder:{tmp_path}", s) for s in ("train", "test"))
    assert (len(train), len(test)) == (9, 1)
    assert train.class_names is None and train.num_classes is None
    assert labels(train) == [-1] * 9


def test_a_flat_test_folder_beside_a_labelled_one_is_unlabelled(tmp_path: Path):
    write_tree(tmp_path, ["train/a/0.jpg", "train/b/0.jpg", "test/0.jpg"])
    assert open_source(f"folder:{tmp_path}").class_names == ("a", "b")
    test = open_source(f"folder:{tmp_path}", "test")
    assert test.class_names is None and labels(test) == [-1]


def test_tiny_imagenet_is_scored_on_its_annotated_images(tmp_path: Path, caplog):
    root = tmp_path / "tiny-imagenet-200"
    train = [f"train/{c}/images/{c}_{i}.JPEG" for c in ("n01", "n02") for i in range(3)]
    held_out = [f"{split}/images/{split}_{i}.JPEG" for split in ("val", "test") for i in range(4)]
    write_tree(root, train + held_out)
    notes = root / "val/val_annotations.txt"
    notes.write_text("".join(f"val_{i}.JPEG\tn0{i % 2 + 1}\t0\t0\t62\t62\n" for i in range(4)))
    archive = zip_tree(root, tmp_path / "tiny.zip", prefix="tiny-imagenet-200/")
    dotted = zip_tree(root, tmp_path / "dotted.zip", prefix="./")
    for path in (root, archive, dotted):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            test = open_source(f"folder:{path}", "test")
        assert labels(test) == [0, 1, 0, 1] and test.class_names == ("n01", "n02")
        assert names(test)[1].endswith("val/images/val_1.JPEG")
        assert "val/ the test split, as test/ has no class of train/" in caplog.text
        assert len(open_source(f"folder:{path}")) == 6
    notes.write_text("val_0.JPEG\tn01\t0\t0\t62\t62\nval_1.JPEG")
    with pytest.raises(
        InputError, match=r"val_annotations\.txt .* has no class for val/images/val_"
    ):
        open_source(f"folder:{root}")
    notes.unlink()
    assert open_source(f"folder:{root}", "test").class_names is None


def test_zip_and_folder_of_one_tree_are_the_same_data(tree: Path, tmp_path: Path):
    spec = f"folder:{zip_tree(tree, tmp_path / 'tree.zip')}"
    for split in ("train", "test"):
        folder, archive = (
            open_source(f"folder:{tree}", split),
            open_source(spec, split),
        )
        assert archive.fingerprint == folder.fingerprint
        assert [archive[i] for i in range(len(archive))] == [folder[i] for i in range(len(folder))]


def test_a_common_top_folder_is_looked_through(tree: Path, tmp_path: Path):
    archive = zip_tree(tree, tmp_path / "deep.zip", prefix="some/where/")
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr("__MACOSX/train/._0.jpg", b"no")
    source = open_source(f"folder:{archive}", "test")
    assert (len(source), source.num_classes) == (6, 3)
    assert source[0]["name"] == "some/where/test/ant/0.jpg"


def test_hidden_files_are_skipped_and_other_suffixes_counted(tree: Path, caplog):
    write_tree(tree, ["train/cat/.hidden.jpg", ".cache/a/1.jpg", "__MACOSX/a/2.jpg"])
    write_tree(tree, ["train/cat/UPPER.JPEG", "train/cat/deeper/5.Png"])
    (tree / "train/cat/notes.txt").write_text("no image")
    (tree / "README.md").write_text("no image")
    with caplog.at_level(logging.INFO):
        source = open_source(f"folder:{tree}")
    assert len(source) == 12 + 2
    assert {"train/cat/UPPER.JPEG", "train/cat/deeper/5.Png"} <= set(names(source))
    assert f"{tree}: left out by suffix: 1 .md, 1 .txt" in caplog.text
    assert "system folders: __MACOSX" in caplog.text


@pytest.mark.parametrize("archived", [False, True])
def test_a_camera_folder_names_all_that_is_left_out_once(tmp_path: Path, archived: bool, caplog):
    found = [f"a/{i}.{suffix}" for i, suffix in enumerate(("jpg", "JFIF", "jpe", "mpo") * 3)]
    others = ["a/1.HEIC", "a/2.heic", "a/3.MOV", "a/3.AAE", "a/IMG_4", "a/5.jpg.part"]
    root = write_tree(tmp_path / "camera", found + others)
    spec = f"folder:{zip_tree(root, tmp_path / 'camera.zip') if archived else root}"
    with caplog.at_level(logging.INFO):
        splits = [open_source(spec, split) for split in ("train", "test")]
    assert sorted(names(splits[0]) + names(splits[1])) == sorted(found)
    (message,) = [text for text in caplog.messages if "left out" in text]
    assert (
        "by suffix: 2 .heic, 1 without a suffix, 1 .aae, 1 .mov, 1 .part; HEIC and AVIF" in message
    )
    assert "convert to JPEG" in message and "of videos, take single frames" in message


SYSTEM = ["@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found", "System Volume Information"]


@pytest.mark.parametrize("archived", [False, True])
def test_system_folders_are_no_classes(tmp_path: Path, archived: bool, caplog):
    kept = [f"{c}/{i}.jpg" for c in ("a", "b", "lost and found") for i in range(4)]
    hidden = [f"{name}/0.jpg" for name in (".Trash-1000", ".thumbnails")]
    left = [f"{front}{name}/0.jpg" for name in SYSTEM for front in ("", "a/")]
    root = write_tree(tmp_path / "nas", kept + hidden + left)
    spec = f"folder:{zip_tree(root, tmp_path / 'nas.zip') if archived else root}"
    with caplog.at_level(logging.INFO):
        splits = [open_source(spec, split) for split in ("train", "test")]
    assert sorted(names(splits[0]) + names(splits[1])) == sorted(kept)
    assert splits[0].class_names == ("a", "b", "lost and found")
    assert all(name in caplog.text for name in SYSTEM)


def test_links_that_lead_nowhere_are_counted(tree: Path, caplog):
    for i in range(3):
        (tree / f"train/cat/link{i}.jpg").symlink_to(tree / "not mounted" / f"{i}.jpg")
    with caplog.at_level(logging.INFO):
        assert len(open_source(f"folder:{tree}")) == 12
    assert "3 broken link(s)" in caplog.text


@pytest.fixture
def refused(monkeypatch) -> set[str]:
    """Refuse to list the folders of these names, as of root, which may read all, one cannot."""
    found: set[str] = set()
    listed = os.scandir

    def scandir(path: str) -> object:
        if Path(path).name in found:
            raise PermissionError(13, "Permission denied", path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    return found


def test_a_folder_outside_the_splits_that_cannot_be_listed_is_left_out(
    tree: Path, refused: set[str], caplog
):
    write_tree(tree, ["private/0.jpg", "lost+found/0.jpg"])
    wanted = names(open_source(f"folder:{tree}"))
    refused |= {"private", "lost+found"}
    index_cache._recent.clear()
    with caplog.at_level(logging.INFO):
        assert names(open_source(f"folder:{tree}")) == wanted
    assert "left out 1 folder(s) that cannot be listed, such as private/: Permission denied" in (
        caplog.text
    )


@pytest.mark.parametrize(
    ("files", "name"),
    [
        (SPLIT_TREE, "cat"),
        (SPLIT_TREE, "test"),
        (["a/0.jpg", "b/0.jpg", "c/0.jpg"], "c"),
        (["0.jpg", "1.jpg", "deeper/2.jpg"], "deeper"),
        (["a/0.jpg", "b/0.jpg"], "root"),
    ],
)
def test_a_folder_that_may_hold_records_has_to_be_listed(
    files: list[str], name: str, tmp_path: Path, refused: set[str]
):
    root = write_tree(tmp_path / "root", files)
    refused.add(name)
    with pytest.raises(ValueError, match=rf"cannot list .*{name}/?: .*Permission denied"):
        open_source(f"folder:{root}")


def test_links_are_followed_and_loops_end(tree: Path, tmp_path: Path):
    linked = tmp_path / "linked"
    (linked / "train").mkdir(parents=True)
    for name in ("ant", "cat", "dog"):
        (linked / "train" / name).symlink_to(tree / "train" / name)
    (linked / "test").symlink_to(tree / "test")
    (tree / "train/cat/loop").symlink_to(linked)
    assert len(open_source(f"folder:{linked}")) == 12


def test_mistakes_with_folders_have_one_clear_message(tree: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"no such folder or \.zip: .*nowhere"):
        open_source(f"folder:{tmp_path}/nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ValueError, match=r"no images in .*: it holds no other files.*\. Expected files ending"
    ):
        open_source(f"folder:{tmp_path}/empty")
    (tmp_path / "empty/a.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"no images in .*empty: left out by suffix: 1 \.txt\."):
        open_source(f"folder:{tmp_path}/empty")
    with pytest.raises(ValueError, match=r"neither a folder nor a readable \.zip"):
        open_source(f"folder:{tree}/train/cat/0.jpg")
    write_tree(tree, ["train/loose.jpg"])
    with pytest.raises(ValueError, match=r"mixes 1 loose images \(such as train/loose.jpg\)"):
        open_source(f"folder:{tree}")


def test_a_zip_with_a_password_is_refused_at_once(tree: Path, tmp_path: Path):
    archive = zip_tree(tree, tmp_path / "locked.zip")
    data = bytearray(archive.read_bytes())
    for signature, offset in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        at = data.find(signature)
        data[at + offset] |= 1
    archive.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="protected by a password"):
        open_source(f"folder:{archive}")


def test_files_that_vanish_or_break_later_keep_name_and_label(tree: Path, tmp_path: Path):
    source = open_source(f"folder:{tree}")
    (tree / "train/cat/0.jpg").unlink()
    with pytest.raises(UnreadableRecord, match=r"train/cat/0\.jpg: .*No such file") as info:
        source[4]
    assert (info.value.name, info.value.label) == ("train/cat/0.jpg", 1)

    archive = zip_tree(tree, tmp_path / "damaged.zip")
    content = (tree / "train/dog/2.jpg").read_bytes()
    data = archive.read_bytes()
    archive.write_bytes(data.replace(content, content[:-9] + b"x" + content[-8:]))
    damaged = open_source(f"folder:{archive}")
    bad = names_that_fail(damaged)
    assert bad == ["train/dog/2.jpg: Bad CRC-32 for file 'train/dog/2.jpg'"]


def names_that_fail(source: Source) -> list[str]:
    failures = []
    for index in range(len(source)):
        try:
            source[index]
        except UnreadableRecord as error:
            failures.append(str(error))
    return failures


def test_real_imagenette_zip_uses_val_as_test(shared_data: Path):
    train = open_source(f"folder:{shared_data}/imagenette_like.zip")
    test = open_source(f"folder:{shared_data}/imagenette_like.zip", "test")
    assert (len(train), len(test), train.num_classes) == (1920, 450, 6)
    assert test[0]["name"].startswith("val/n01440764/")


def test_real_cifar10_zip_agrees_with_the_exact_pixels(shared_data: Path):
    lossy = open_source(f"folder:{shared_data}/cifar10.zip", "test")
    exact = open_source(f"arrays:{shared_data}/cifar10_exact_subset.npz", "test")
    assert (len(lossy), lossy.num_classes, lossy.class_names[9]) == (10_000, 10, "truck")
    seen: dict[int, int] = {}
    for i in range(100):
        label, image = exact[i]["label"], exact[i]["image"].astype(float)
        record = lossy[1000 * label + seen.get(label, 0)]
        seen[label] = seen.get(label, 0) + 1
        decoded = np.asarray(Image.open(io.BytesIO(record["image"])))
        assert record["label"] == label
        assert np.square(decoded - image).mean() < 255**2 / 10**2.2  # 22 dB

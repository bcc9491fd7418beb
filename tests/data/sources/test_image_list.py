"""Lists as people have them: every spelling of the same rows names the same images."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmoco.config import ConfigError
from fastmoco.data.sources.image_list import labelled_list, open_list, read_list
from fastmoco.evaluate.labelled_images import LabelledImages

LIMIT = 10**8
NAMES = ["a/1.jpg", "a/it's, so.jpg", "b/3 of 4; good.jpg", "b/über.jpg", "#5.jpg", "6.jpg"]
CLASSES = ["10", "9", "10", "2", "9", "2"]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for number, name in enumerate(NAMES):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (9, 8 + number, 3), np.uint8)
        Image.fromarray(pixels).save(root / name)
    return root


def write(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


def check(path: Path, labels: list[str] | None = None) -> None:
    source = open_list(str(path), LIMIT)
    assert [source.name(i) for i in range(len(source.sizes))] == [
        str(path.parent / name) for name in NAMES
    ]
    assert source.sizes[:, 0].tolist() == [8, 9, 10, 11, 12, 13]
    assert not source.bad
    if labels is not None:
        paths, numbers, classes = labelled_list(path)
        assert paths == [path.parent / name for name in NAMES]
        assert [classes[number] for number in numbers] == labels
        assert classes == ["2", "9", "10"]  # as numbers


PLAIN = "\n".join(NAMES) + "\n"


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        *((PLAIN, code) for code in ("utf-8", "utf-8-sig", "utf-16", "utf-32")),
        *(("\ufeff" + PLAIN.replace("\n", "\r\n"), code) for code in ("utf-16-le", "utf-16-be")),
        (PLAIN.replace("\n", "\r\n"), "utf-16-le"),  # without a mark
        (PLAIN.replace("\n", "\r\n"), "utf-8"),
        (PLAIN.replace("\n", "\r"), "utf-8"),
        (PLAIN.strip(), "utf-8"),
        ("\n".join(["# the images", "", *NAMES, "#", "#! end", "  "]), "utf-8"),
        ("\n".join(f'"{name}"' for name in NAMES), "utf-8"),
        ("\n".join(f"  {name} " for name in NAMES), "utf-8"),
    ],
)
def test_plain_lists(images: Path, text: str, encoding: str) -> None:
    check(write(images / "list.txt", text, encoding))
    with pytest.raises(ConfigError, match="has no labels: add a column"):
        labelled_list(images / "list.txt")


def table(sign: str, header: list[str] | None, row: Callable[[int], list[str]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter=sign, lineterminator="\n")
    writer.writerows([*([header] if header else []), *(row(i) for i in range(len(NAMES)))])
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", [".csv", ".txt", ".tsv"])
@pytest.mark.parametrize("sign", ["\t", ";", ","])
def test_tables(images: Path, sign: str, suffix: str) -> None:
    path = images / f"list{suffix}"
    tables = [
        table(sign, None, lambda i: [NAMES[i], CLASSES[i]]),
        table(sign, None, lambda i: [CLASSES[i], NAMES[i]]),
        table(sign, ["", "filepath", "label"], lambda i: [str(i), NAMES[i], CLASSES[i]]),  # pandas
        table(sign, ["Class", "Image Path"], lambda i: [CLASSES[i], NAMES[i]]),
        table(sign, ["id", "file_name", "y", "width"], lambda i: ["7", NAMES[i], CLASSES[i], "5"]),
        table(sign, ["what", "it is"], lambda i: [NAMES[i], CLASSES[i]]),
        "# made by hand\n" + table(sign, ["category_id", "IMG"], lambda i: [CLASSES[i], NAMES[i]]),
    ]
    for text in tables:
        check(write(path, text), CLASSES)
        check(write(path, text.replace("\n", "\r\n"), "utf-8-sig"), CLASSES)
        path.unlink()


def test_labels_of_a_list_are_those_of_an_evaluation(images: Path) -> None:
    path = write(images / "list.csv", table(",", None, lambda i: [NAMES[i], CLASSES[i]]))
    found = LabelledImages(path, resize=8, image_size=8)
    assert [found.class_names[label] for label in found.labels] == CLASSES
    assert found.paths == [images / name for name in NAMES]


def test_a_path_and_its_label_with_a_space_between(images: Path) -> None:
    text = "\n".join(f"{name} {label}" for name, label in zip(NAMES, CLASSES, strict=True))
    check(write(images / "list.txt", text), CLASSES)


@pytest.mark.parametrize(
    ("header", "told"),
    [
        (["path", "filename", "label"], r"paths \(path, filename\)"),
        (["left", "right"], r"paths \(left, right\)"),
    ],
)
def test_two_columns_of_paths_are_refused_by_name(
    images: Path, header: list[str], told: str
) -> None:
    text = table(",", header, lambda i: [NAMES[i], NAMES[i], "1"][: len(header)])
    with pytest.raises(ConfigError, match=told):
        open_list(str(write(images / "list.csv", text)), LIMIT)


def test_labels_that_are_not_clear_are_refused_where_they_are_asked_for(images: Path) -> None:
    text = table(",", ["path", "class_name", "class_id"], lambda i: [NAMES[i], "x", "1"])
    check(write(images / "list.csv", text))
    with pytest.raises(ConfigError, match=r"labels \(class_name, class_id\): keep one"):
        labelled_list(images / "list.csv")
    write(images / "list.csv", "path,label\na/1.jpg,3\n6.jpg,\n")
    with pytest.raises(ConfigError, match=r"has no label in line 3"):
        labelled_list(images / "list.csv")


@pytest.mark.parametrize(
    ("sign", "suffix"), [*((s, t) for s in "\t;," for t in (".csv", ".txt")), (" ", ".txt")]
)
@pytest.mark.parametrize("at", [0, 1, 5, 60])
def test_a_line_without_its_label_is_an_image_and_named_where_labels_are_asked_for(
    images: Path, at: int, sign: str, suffix: str
) -> None:
    """Also after the lines that tell how a list is written, and where its whole line is a file."""
    lines = [f"{NAMES[n % 2]}{sign}{n}" for n in range(70)]
    if sign == ",":
        lines = [f'"{NAMES[n % 2]}",{n}' for n in range(70)]
    lines[at] = "6.jpg"
    path = write(images / f"list{suffix}", "\n".join(lines))
    source = open_list(str(path), LIMIT)
    assert len(source.sizes) == 70
    assert not source.bad
    assert source.name(at) == str(images / "6.jpg")
    told = rf"list{suffix} has no label in line {at + 1}: write it there, or delete the line\."
    with pytest.raises(ConfigError, match=told):
        labelled_list(path)


def test_a_line_without_its_path_is_refused_by_its_number(images: Path) -> None:
    for line in ("7", "7,", "7, "):
        path = write(images / "list.csv", f"label,path\n3,a/1.jpg\n,\n{line}\n2,6.jpg\n")
        with pytest.raises(
            ConfigError, match=r"list\.csv names no image in line 4: write its path"
        ):
            open_list(str(path), LIMIT)
    path = write(images / "list.csv", "label,path\n3,a/1.jpg\n,\n2,6.jpg\n")  # nothing in it
    assert read_list(path).lines == [2, 4]


ROWS = [f"{name},{n}" for n, name in enumerate(["a/1.jpg", "6.jpg", "#5.jpg"] * 30)]


@pytest.mark.parametrize(
    ("at", "row", "told"),
    [
        *((at, '"6.jpg,7', f"a quote in line {at + 1} that is not closed") for at in (0, 8, 70)),
        *((at, '6.jpg,"7', f"a quote in line {at + 1} that is not closed") for at in (0, 8, 70)),
        (8, '6.jpg,"7\n6.jpg,"8', "a quote in line 9 that is not closed"),
        (8, '6.jpg,"7\n6.jpg,8"', "a quote in line 9 that is not closed"),
        (8, '"6.jpg,7\n6.jpg,8"', "a quote in line 9 that is not closed"),
        (8, '"6.jpg,7\n6.jpg,7\n6.jpg",8', "a quote in line 9 that is not closed"),
        (8, '6.jpg,"' + "7" * 200_000 + '"', "a cell of more than 131,072 signs in line 9: close"),
        (8, "6.jpg,7\r6.jpg,8", "a carriage return in the middle of line 9: delete it"),
    ],
)
def test_a_line_that_would_swallow_others_is_refused_by_its_number(
    images: Path, at: int, row: str, told: str
) -> None:
    lines = [*ROWS[:at], row, *ROWS[at:]]
    path = write(images / "list.csv", "\n".join(lines))
    with pytest.raises(ConfigError, match=rf"The list .*list\.csv has {told}"):
        open_list(str(path), LIMIT)


def test_texts_in_quotes_may_have_lines(images: Path) -> None:
    text = 'text,path,label\n"a dog,\nas in b.jpg, it\nruns",a/1.jpg,2\n"a ""b"" c" ,6.jpg,9\n'
    rows = read_list(write(images / "list.csv", text))
    assert rows.paths == ["a/1.jpg", "6.jpg"]
    assert rows.labels == ["2", "9"]
    assert rows.lines == [2, 5]


def test_places_other_than_the_folder_of_the_list(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(images))
    monkeypatch.setenv("CAMERA", "b")
    (images / "$1.jpg").write_bytes((images / "6.jpg").read_bytes())
    here = images.parent / "lists"
    here.mkdir()
    lines = ["~/a/1.jpg", "$HOME/${CAMERA}/%C3%BCber.jpg", f"file://{images}/b/%C3%BCber.jpg"]
    lines += ["../images/6.jpg", "..\\images\\6.jpg", f"{images}/$1.jpg", str(images / "#5.jpg")]
    rows = read_list(write(here / "list.txt", "\n".join(lines)))
    assert rows.paths == [
        f"{images}/a/1.jpg",
        f"{images}/b/%C3%BCber.jpg",
        f"{images}/b/über.jpg",
        *["../images/6.jpg"] * 2,
        f"{images}/$1.jpg",
        f"{images}/#5.jpg",
    ]
    write(here / "list2.txt", "../images/6.jpg")
    write(images / "list3.txt", "6.jpg\nnone.jpg")
    source = open_list(f"{images.parent}/{{lists/list2,images/list3}}.txt", LIMIT)
    assert [os.path.realpath(source.name(i)) for i in range(2)] == [str(images / "6.jpg")] * 2
    assert source.bad == {2: "list3.txt line 2: FileNotFoundError: No such file or directory"}


def test_names_are_bytes(images: Path) -> None:
    name = os.fsdecode(b"caf\xe9.jpg")
    (images / name).write_bytes((images / "6.jpg").read_bytes())
    (images / "list.txt").write_bytes(b"caf\xe9.jpg\r\n6.jpg")
    source = open_list(str(images / "list.txt"), LIMIT)
    assert not source.bad
    assert source.name(0) == str(images / name)


def test_what_is_no_list_or_no_file_is_named_with_its_line(images: Path) -> None:
    cases: dict[bytes, str] = {
        b"a/1.jpg\n\n6.jpg\0\n": "NUL byte in line 3",
        b"\x1f\x8b\x08\0" + bytes(50): "NUL byte in line 1",
        (images / "6.jpg").read_bytes(): "NUL byte in line",
        b"\xff\xfea\0/": "no text in utf-16",
    }
    for data, told in cases.items():
        (images / "list.txt").write_bytes(data)
        with pytest.raises(ConfigError, match=told) as caught:
            open_list(str(images / "list.txt"), LIMIT)
        assert "\n" not in str(caught.value)
    os.mkfifo(images / "pipe")
    (images / "list.txt").write_text("# entries\na\npipe\n/dev/zero\n\na/1.jpg\n")
    assert open_list(str(images / "list.txt"), LIMIT).bad == {
        0: "line 2: IsADirectoryError: Is a directory",
        1: "line 3: OSError: a FIFO, not a regular file",
        2: "line 4: OSError: a device, not a regular file",
    }
    (images / "circle").symlink_to("circle")
    for place in (images, images / "pipe", images / "circle"):
        with pytest.raises(ConfigError, match=r"cannot be read( as a list|: Too many)"):
            open_list(str(place), LIMIT)


def test_the_index_column_of_pandas_is_no_path_where_names_have_no_suffix(tmp_path: Path) -> None:
    rows = read_list(write(tmp_path / "list.csv", ",0\n\n0,a/one\n1,a/two\n2,a/three\n"))
    assert rows.paths == ["a/one", "a/two", "a/three"]
    assert rows.lines == [3, 4, 5]  # an empty line counts


def test_a_header_with_fewer_names_than_columns_is_a_sentence_about_labels(tmp_path: Path) -> None:
    path = write(tmp_path / "list.csv", "id,path\n0,1.jpg,2\n1,2.jpg,3\n")
    assert read_list(path).paths == ["1.jpg", "2.jpg"]
    path = write(tmp_path / "list.csv", ",path\n0,1.jpg,2\n1,2.jpg,3\n")
    with pytest.raises(ConfigError, match="has no labels: add a column label"):
        labelled_list(path)

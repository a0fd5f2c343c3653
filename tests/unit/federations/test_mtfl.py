"""The MTFL federation, on a small made-up data set in its format; and on the real one, where FEDGRADNORM_MTFL names it."""

import shutil
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fedgradnorm.errors import ConfigError, DataError
from fedgradnorm.federations import mtfl, mtfl_archive
from fedgradnorm.federations.mtfl import FAILURE_RATE, LANDMARK_ERROR, make
from fedgradnorm.federations.mtfl_annotations import NUM_CLASSES, Face, read_faces
from fedgradnorm.federations.mtfl_images import Crop, face_arrays, face_square

NUM_TRAIN, NUM_TEST = 23, 7
IMAGE_SIDE = 120
SHAPE = np.array([[-12.0, -12.0], [12.0, -12.0], [0.0, 2.0], [-9.0, 14.0], [9.0, 14.0]])
LABELS = np.array(
    [[1 + i % 2, 1 + i // 2 % 2, 1 + i // 3 % 2, 1 + i % 5] for i in range(NUM_TRAIN + NUM_TEST)]
)
DEFAULT = Crop(image_size=40, colour=False, margin=0.5, jitter=0.15)


def encoded(pixels: np.ndarray, format: str = "JPEG") -> bytes:
    content = BytesIO()
    Image.fromarray(pixels).save(content, format, **({"quality": 95} if format == "JPEG" else {}))
    return content.getvalue()


def annotation(image: str, landmarks: np.ndarray, labels: object) -> str:
    return " ".join(
        [
            image,
            *(f"{number:.4f}" for number in np.asarray(landmarks).T.reshape(-1)),
            *map(str, labels),
        ]
    )


def landmarks_of(index: int) -> np.ndarray:
    return SHAPE + np.random.default_rng(index).uniform(35, IMAGE_SIDE - 35, size=2)


def fake_files() -> dict[str, bytes]:
    """A data set as the official archive has it: leading spaces, both slashes, blank lines, grey and colour images."""
    files, lines = {}, []
    for index, labels in enumerate(LABELS):
        folder, slash = [("lfw_5590", "\\"), ("net_7876", "\\"), ("AFLW", "/")][index % 3]
        rng = np.random.default_rng(index)
        shape = (IMAGE_SIDE, IMAGE_SIDE) if index % 4 == 0 else (IMAGE_SIDE, IMAGE_SIDE, 3)
        files[f"{folder}/face_{index}.jpg"] = encoded(
            rng.integers(0, 256, size=shape, dtype=np.uint8)
        )
        lines.append(
            annotation(
                f"{' ' * (index % 2)}{folder}{slash}face_{index}.jpg", landmarks_of(index), labels
            )
        )
    files["training.txt"] = "\n".join([*lines[:NUM_TRAIN], " ", ""]).encode()
    files["testing.txt"] = "\r\n".join([*lines[NUM_TRAIN:], "", ""]).encode()
    return files


def write_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def write_folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDGRADNORM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def files() -> dict[str, bytes]:
    return fake_files()


@pytest.fixture
def archive(tmp_path: Path, files: dict[str, bytes]) -> Path:
    return write_zip(tmp_path / "MTFL.zip", files)


def loaded(path: Path, crop: Crop = DEFAULT) -> dict[str, np.ndarray]:
    return face_arrays(path, read_faces(path), crop)


def refuse_images(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("an image was read")

    monkeypatch.setattr(Image, "open", refuse)


class TestReading:
    @pytest.mark.parametrize("write", [write_zip, write_folder])
    @pytest.mark.parametrize("top", ["", "MTFL/"])
    def test_zip_and_folder_with_and_without_a_top_folder_give_the_same(
        self,
        tmp_path: Path,
        files: dict[str, bytes],
        archive: Path,
        write: Callable[[Path, dict[str, bytes]], Path],
        top: str,
    ) -> None:
        expected = loaded(archive)
        found = loaded(
            write(tmp_path / "other", {top + name: content for name, content in files.items()})
        )
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(found[name], array)

    def test_labels_are_zero_based_and_in_the_order_of_the_lines(self, archive: Path) -> None:
        arrays = loaded(archive)
        np.testing.assert_array_equal(arrays["train_labels"], LABELS[:NUM_TRAIN] - 1)
        np.testing.assert_array_equal(arrays["test_labels"], LABELS[NUM_TRAIN:] - 1)

    def test_shapes(self, archive: Path) -> None:
        grey, colour = (
            loaded(archive),
            loaded(archive, Crop(32, colour=True, margin=0.5, jitter=0.1)),
        )
        assert grey["train_images"].shape == (NUM_TRAIN, 1, 40, 40)
        assert colour["test_images"].shape == (NUM_TEST, 3, 32, 32)
        assert grey["train_landmarks"].shape == (NUM_TRAIN, 10)

    def test_a_byte_order_mark_is_passed_over(
        self, tmp_path: Path, files: dict[str, bytes]
    ) -> None:
        files["training.txt"] = b"\xef\xbb\xbf" + files["training.txt"]
        assert len(read_faces(write_zip(tmp_path / "bom.zip", files))["train"]) == NUM_TRAIN


class TestCrop:
    @pytest.mark.parametrize("centre", [(60, 60), (21, 24), (97, 95), (24, 95)])
    @pytest.mark.parametrize("point", range(5))
    def test_a_dot_at_a_landmark_is_where_the_target_says(
        self, tmp_path: Path, centre: tuple[int, int], point: int
    ) -> None:
        landmarks = SHAPE + np.array(centre)
        pixels = np.zeros((IMAGE_SIDE, IMAGE_SIDE), dtype=np.uint8)
        x, y = landmarks[point].astype(int)
        pixels[y - 2 : y + 2, x - 2 : x + 2] = 255
        line = annotation("dot.png", landmarks, (1, 1, 1, 1)).encode()
        path = write_zip(
            tmp_path / "dot.zip",
            {"dot.png": encoded(pixels, "PNG"), "training.txt": line, "testing.txt": line},
        )
        arrays = loaded(path)
        image, target = (
            arrays["train_images"][0, 0].astype(float),
            arrays["train_landmarks"][0].reshape(2, 5)[:, point],
        )
        middles = np.arange(40) + 0.5
        found = [
            image.sum(axis=0) @ middles / image.sum(),
            image.sum(axis=1) @ middles / image.sum(),
        ]
        np.testing.assert_allclose(found, target * 40, atol=0.3)

    @pytest.mark.parametrize("colour", [False, True])
    @pytest.mark.parametrize("mode", ["I;16", "1", "P", "LA", "RGBA", "RGB"])
    def test_pixels_of_every_mode_go_to_8_bits_by_their_range(
        self, tmp_path: Path, mode: str, colour: bool
    ) -> None:
        pixels = (
            np.random.default_rng(0).integers(0, 256, (IMAGE_SIDE, IMAGE_SIDE)).astype(np.uint8)
        )
        if mode == "1":
            pixels = np.where(pixels > 127, 255, 0).astype(np.uint8)
        image = Image.fromarray(pixels)
        deep = Image.fromarray(pixels.astype(np.uint16) * 257)
        image = deep if mode == "I;16" else image.convert(mode, dither=Image.Dither.NONE)
        found = []
        for name, one in (("other", image), ("plain", Image.fromarray(pixels))):
            buffer = BytesIO()
            one.save(buffer, "PNG")
            line = annotation("face.png", SHAPE + 60, (1, 1, 1, 1)).encode()
            path = write_zip(
                tmp_path / f"{name}.zip",
                {"face.png": buffer.getvalue(), "training.txt": line, "testing.txt": line},
            )
            found.append(loaded(path, replace(DEFAULT, colour=colour))["train_images"].astype(int))
        assert np.abs(found[0] - found[1]).max() <= 1

    def test_pixels_of_no_known_range_are_refused(self, tmp_path: Path) -> None:
        from fedgradnorm.federations.mtfl_images import _in_eight_bits

        face = Face("face.tif", SHAPE, (0, 0, 0, 0), "training.txt line 1")
        deep = Image.fromarray(
            np.array([[0, 257 * 7, 65535]], dtype=np.int32)
        )  # as some versions of Pillow have 16 bits
        assert np.asarray(_in_eight_bits(Image, deep, face)).tolist() == [[0, 7, 255]]
        for pixels in (
            np.full((9, 9), 70_000, dtype=np.int32),
            np.full((9, 9), -1, dtype=np.int32),
            np.zeros((9, 9), dtype=np.float32),
        ):
            with pytest.raises(
                DataError,
                match=r"line 1: 'face.tif' has pixels of mode '[IF]', expected 8 or 16 bits a channel",
            ):
                _in_eight_bits(Image, Image.fromarray(pixels), face)

    @pytest.mark.parametrize("most", [255, 4095])
    def test_16_bits_with_values_of_8_or_12_are_refused(self, most: int) -> None:
        from fedgradnorm.federations.mtfl_images import _in_eight_bits

        face = Face("face.png", SHAPE, (0, 0, 0, 0), "training.txt line 1")
        pixels = np.array([[0, 7, most]], dtype=np.uint16)
        with pytest.raises(
            DataError,
            match=f"line 1: 'face.png' has 16 bits a channel, but its largest value is {most}",
        ):
            _in_eight_bits(Image, Image.fromarray(pixels), face)
        assert np.asarray(_in_eight_bits(Image, Image.fromarray(0 * pixels), face)).max() == 0

    def test_past_the_image_its_edge_pixels_are_repeated(self, tmp_path: Path) -> None:
        pixels = np.full((IMAGE_SIDE, IMAGE_SIDE), 10, dtype=np.uint8)
        pixels[:, 0] = np.linspace(100, 250, IMAGE_SIDE)
        line = annotation("edge.png", SHAPE + np.array([13, 60]), (1, 1, 1, 1)).encode()
        path = write_zip(
            tmp_path / "edge.zip",
            {"edge.png": encoded(pixels, "PNG"), "training.txt": line, "testing.txt": line},
        )
        image = loaded(path)["train_images"][0, 0].astype(int)
        assert (image[:, 0] > 90).all()
        np.testing.assert_array_equal(image[:, 0], image[:, 1])
        assert (np.diff(image[:, 0]) >= 0).all()
        assert (image[:, -1] == 10).all()

    def test_the_jitter_is_fixed_by_the_path_of_the_image(self) -> None:
        face = Face("a/b.jpg", SHAPE + 60, (0, 0, 0, 0), "")
        corner, side = face_square(face, DEFAULT)
        again, same_side = face_square(face, DEFAULT)
        other, other_side = face_square(Face("a/c.jpg", SHAPE + 60, (0, 0, 0, 0), ""), DEFAULT)
        np.testing.assert_array_equal(corner, again)
        assert side == same_side
        assert side != other_side
        assert not np.allclose(corner, other)

    def test_without_jitter_the_box_is_in_the_middle(self) -> None:
        corner, side = face_square(
            Face("a.jpg", SHAPE + 60, (0, 0, 0, 0), ""),
            Crop(40, colour=False, margin=0.5, jitter=0),
        )
        assert side == pytest.approx(2 * 26)
        np.testing.assert_allclose(corner, [60 - 26, 61 - 26])

    @pytest.mark.parametrize("jitter", [0, 0.1, 0.15, 0.25, 0.5])
    def test_the_smallest_margin_for_a_jitter_keeps_every_landmark_inside(
        self, jitter: float
    ) -> None:
        margin = ((0.5 + jitter) * 2 * (1 + jitter) - 1) / 2
        crop = Crop(40, colour=False, margin=margin, jitter=jitter)
        for index in range(500):
            corner, side = face_square(Face(f"{index}.jpg", SHAPE, (0, 0, 0, 0), ""), crop)
            assert (corner <= SHAPE.min(axis=0) + 1e-9).all()
            assert (corner + side >= SHAPE.max(axis=0) - 1e-9).all()
        if jitter:
            with pytest.raises(ConfigError, match="margin: a jitter of"):
                Crop(40, colour=False, margin=margin - 0.01, jitter=jitter)


class TestCache:
    def test_the_second_load_reads_no_image(
        self, archive: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = make(0, archive)
        first.check_data()
        assert len(list(cache.iterdir())) == 1
        refuse_images(monkeypatch)
        second = make(0, archive)
        for one, two in zip(first.clients, second.clients, strict=True):
            torch.testing.assert_close(one.train_data, two.train_data)
            torch.testing.assert_close(one.test_data, two.test_data)

    def test_other_options_are_another_entry(self, archive: Path, cache: Path) -> None:
        crops = [
            DEFAULT,
            Crop(40, True, 0.5, 0.15),
            Crop(32, False, 0.5, 0.15),
            Crop(40, False, 0.6, 0.15),
            Crop(40, False, 0.5, 0.1),
        ]
        for crop in crops:
            loaded(archive, crop)
        assert len(list(cache.iterdir())) == len(crops)

    def test_a_changed_file_is_another_entry(
        self, tmp_path: Path, files: dict[str, bytes], cache: Path
    ) -> None:
        folder = write_folder(tmp_path / "folder", files)
        loaded(folder)
        image = next(name for name in files if name.endswith(".jpg"))
        write_folder(folder, {image: encoded(np.zeros((IMAGE_SIDE, IMAGE_SIDE), dtype=np.uint8))})
        loaded(folder)
        write_folder(folder, {"testing.txt": files["testing.txt"] + b" \n"})
        loaded(folder)
        assert len(list(cache.iterdir())) == 3


class TestMake:
    def test_building_reads_no_image(self, archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        refuse_images(monkeypatch)
        federation = make(0, archive)
        assert federation.num_features == 100
        assert federation.client_ids == ["landmarks", "gender", "smile", "glasses", "pose"]

    def test_the_clients_share_one_load(
        self, archive: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls = []
        monkeypatch.setattr(
            mtfl, "face_arrays", lambda *arguments: calls.append(1) or face_arrays(*arguments)
        )
        make(0, archive, clients_per_task=2).check_data()
        assert len(calls) == 1

    def test_training_parts_are_disjoint_and_the_test_split_is_whole(self, archive: Path) -> None:
        federation = make(3, archive, clients_per_task=2)
        parts = [client.train_data[0] for client in federation.clients]
        images = torch.cat(parts).flatten(1)
        assert len(images) == NUM_TRAIN
        assert len(images.unique(dim=0)) == NUM_TRAIN
        for client in federation.clients:
            assert client.test_data[0].shape == (NUM_TEST, 1, 40, 40)

    def test_targets_fit_their_images(self, archive: Path) -> None:
        arrays = loaded(archive)
        images = mtfl.standardised(arrays["train_images"]).flatten(1)
        columns = {name: arrays["train_labels"][:, index] for index, name in enumerate(NUM_CLASSES)}
        for client in make(1, archive).clients:
            found, targets = client.train_data
            rows = [int((images == image).all(dim=1).nonzero()) for image in found.flatten(1)]
            expected = (
                arrays["train_landmarks"]
                if client.id == "landmarks"
                else columns[client.id].astype(np.int64)
            )
            np.testing.assert_array_equal(targets.numpy(), expected[rows])

    def test_images_are_standardised_one_by_one(self, archive: Path) -> None:
        images = make(0, archive, tasks=["smile"], colour=True).clients[0].train_data[0]
        assert images.dtype == torch.float32
        torch.testing.assert_close(
            images.mean(dim=(1, 2, 3)), torch.zeros(NUM_TRAIN), atol=1e-5, rtol=0
        )
        torch.testing.assert_close(images.std(dim=(1, 2, 3)), torch.ones(NUM_TRAIN))

    def test_an_empty_image_becomes_zeros(self) -> None:
        assert mtfl.standardised(np.full((1, 1, 16, 16), 200, dtype=np.uint8)).abs().max() < 1e-4

    def test_another_seed_is_another_split_of_the_same_crops(self, archive: Path) -> None:
        one, two = (
            make(seed, archive, tasks=["smile", "pose"]).clients[0].train_data[0] for seed in (0, 1)
        )
        assert not torch.equal(one, two)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"image_size": 8}, "image_size: expected 16 to 256 pixels, found 8"),
            ({"image_size": 1000}, "image_size: expected 16 to 256 pixels, found 1000"),
            ({"margin": -0.1}, "margin: expected a number from 0 to 2, found -0.1"),
            ({"jitter": float("nan")}, "jitter: expected a number from 0 to 2, found nan"),
            ({"margin": 0.1}, "margin: a jitter of 0.15 needs at least 0.247"),
            ({"tasks": ["smiles"]}, "did you mean 'smile'"),
        ],
    )
    def test_option_errors_come_at_once(self, options: dict[str, object], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            make(0, "nowhere", **options)

    def test_sizes_are_checked_against_the_file(self, archive: Path) -> None:
        with pytest.raises(ConfigError, match="the training data have 23"):
            make(0, archive, sizes={"smile": 24}).check_data()

    def test_the_variable_stands_in_for_the_path(
        self, archive: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("FEDGRADNORM_MTFL", raising=False)
        with pytest.raises(
            DataError, match=r"path: expected MTFL\.zip .* in \$FEDGRADNORM_MTFL; found neither"
        ):
            make(0).check_data()
        monkeypatch.setenv("FEDGRADNORM_MTFL", str(archive))
        make(0).check_data()

    def test_models_are_built_without_the_data(self) -> None:
        federation = make(0, "nowhere", colour=True, image_size=32)
        assert federation.input_shape == (3, 32, 32)
        assert federation.num_features == 100


def line_of(**changes: object) -> bytes:
    """One annotation line with fields replaced: ``line_of(f3="x")`` changes field 3."""
    fields = annotation("AFLW/face_2.jpg", landmarks_of(2), (1, 2, 1, 5)).split()
    for name, value in changes.items():
        fields[int(name[1:])] = str(value)
    return " ".join(fields).encode()


class TestBadArchives:
    def test_missing_path(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"nowhere\.zip: no such file or folder"):
            make(0, tmp_path / "nowhere.zip").check_data()

    @pytest.mark.parametrize("content", [b"", b"no zip at all", "cut"])
    def test_corrupt_zip(self, tmp_path: Path, archive: Path, content: bytes | str) -> None:
        bad = tmp_path / "bad.zip"
        bad.write_bytes(archive.read_bytes()[:-100] if isinstance(content, str) else content)
        with pytest.raises(DataError, match=r"bad\.zip: expected MTFL\.zip or its unpacked folder"):
            make(0, bad).check_data()

    @pytest.mark.parametrize("write", [write_zip, write_folder])
    @pytest.mark.parametrize("name", ["training.txt", "testing.txt"])
    def test_missing_annotations(
        self,
        tmp_path: Path,
        files: dict[str, bytes],
        name: str,
        write: Callable[[Path, dict[str, bytes]], Path],
    ) -> None:
        del files[name]
        with pytest.raises(
            DataError,
            match=f"data: expected a file '{name}' in it or in its top folder, found none",
        ):
            make(0, write(tmp_path / "data", files)).check_data()

    def test_two_data_sets_in_one(self, tmp_path: Path, files: dict[str, bytes]) -> None:
        twice = {f"{top}/{name}": content for top in "ab" for name, content in files.items()}
        with pytest.raises(DataError, match=r"together in one folder, found \['a/', 'b/'\]"):
            make(0, write_zip(tmp_path / "data", twice)).check_data()

    @pytest.mark.parametrize(
        "name",
        [
            "../evil.jpg",
            "AFLW/../../evil.jpg",
            "/etc/evil.jpg",
            "AFLW\\..\\evil.jpg",
            "C:\\evil.jpg",
            "C:evil.jpg",
        ],
    )
    def test_entries_that_lead_out(
        self, tmp_path: Path, files: dict[str, bytes], name: str
    ) -> None:
        with pytest.raises(
            DataError, match=r"data: entry .*evil\.jpg': expected a path inside the data set"
        ):
            make(0, write_zip(tmp_path / "data", {**files, name: b""})).check_data()

    @pytest.mark.parametrize(
        "name",
        [
            "../evil.jpg",
            "AFLW/../../evil.jpg",
            "/etc/evil.jpg",
            "\\evil.jpg",
            "C:\\evil.jpg",
            "a\0evil.jpg",
        ],
    )
    @pytest.mark.parametrize("write", [write_zip, write_folder])
    def test_annotation_paths_that_lead_out(
        self,
        tmp_path: Path,
        files: dict[str, bytes],
        name: str,
        write: Callable[[Path, dict[str, bytes]], Path],
    ) -> None:
        files["testing.txt"] = line_of(f0=name)
        with pytest.raises(
            DataError,
            match=r"testing\.txt line 1: path .*evil\.jpg': expected a path inside the data set",
        ):
            make(0, write(tmp_path / "data", files)).check_data()

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            (
                b"AFLW/face_2.jpg 1 2 3",
                r"expected 15 fields \(path, x1..x5, y1..y5, gender, smile, glasses, pose\), found 4",
            ),
            (line_of() + b" 1", "expected 15 fields .*, found 16"),
            (line_of(f3="12,5"), "expected a finite number below 1000000, found '12,5'"),
            (line_of(f3="nan"), "expected a finite number below 1000000, found 'nan'"),
            (line_of(f10="1e999"), "expected a finite number below 1000000, found '1e999'"),
            (line_of(f11=0), "gender: expected a whole number from 1 to 2, found 0"),
            (line_of(f12=3), "smile: expected a whole number from 1 to 2, found 3"),
            (line_of(f13=1.5), "glasses: expected a whole number from 1 to 2, found 1.5"),
            (line_of(f14=6), "pose: expected a whole number from 1 to 5, found 6"),
            (
                line_of(**{f"f{index}": 50 for index in range(1, 11)}),
                r"eyes at least one pixel apart, found 0 \(all landmarks span 0 pixels\)",
            ),
            (b"\xff\xfe\x00", "expected text, found other bytes"),
            (b"\n \n", "expected one line a face, found none"),
        ],
    )
    def test_bad_lines(
        self, tmp_path: Path, files: dict[str, bytes], line: bytes, message: str
    ) -> None:
        files["testing.txt"] = line_of() + b"\n\n" + line if line.strip() else line
        with pytest.raises(DataError, match=message) as caught:
            make(0, write_zip(tmp_path / "data.zip", files)).check_data()
        assert "data.zip: testing.txt" in str(caught.value)
        if "text" not in message and "none" not in message:
            assert "testing.txt line 3: " in str(caught.value)


def png_header(width: int, height: int) -> bytes:
    """The start of a PNG that claims this size."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    )


class TestBadImages:
    NAME = "AFLW/face_2.jpg"

    @pytest.mark.parametrize("write", [write_zip, write_folder])
    def test_missing(
        self,
        tmp_path: Path,
        files: dict[str, bytes],
        write: Callable[[Path, dict[str, bytes]], Path],
    ) -> None:
        del files[self.NAME]
        federation = make(0, write(tmp_path / "data", files))
        with pytest.raises(DataError, match=r"training\.txt line 3: .*AFLW/face_2\.jpg"):
            federation.check_data()

    @pytest.mark.parametrize("content", [b"", b"no image", "cut", png_header(10, 10)])
    def test_corrupt(self, tmp_path: Path, files: dict[str, bytes], content: bytes | str) -> None:
        files[self.NAME] = files[self.NAME][:500] if isinstance(content, str) else content
        with pytest.raises(
            DataError,
            match=r"training\.txt line 3: 'AFLW/face_2\.jpg' is no image that Pillow can read",
        ):
            loaded(write_folder(tmp_path / "data", files))

    def test_damaged_entry(self, tmp_path: Path, files: dict[str, bytes], archive: Path) -> None:
        content = archive.read_bytes()
        middle = content.index(files[self.NAME]) + 600
        bad = tmp_path / "bad.zip"
        bad.write_bytes(content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :])
        with pytest.raises(
            DataError, match=r"training\.txt line 3: the entry 'AFLW/face_2\.jpg' is damaged"
        ):
            loaded(bad)

    @pytest.mark.parametrize("side", [5001, 10_000, 30_000])
    def test_decompression_bomb(self, tmp_path: Path, files: dict[str, bytes], side: int) -> None:
        files[self.NAME] = png_header(side, side)
        with pytest.raises(
            DataError,
            match=r"training\.txt line 3: 'AFLW/face_2\.jpg' (has 5001 x 5001 pixels|is no image)",
        ):
            loaded(write_zip(tmp_path / "data", files))

    @pytest.mark.parametrize("write", [write_zip, write_folder])
    def test_too_many_bytes(
        self,
        tmp_path: Path,
        files: dict[str, bytes],
        monkeypatch: pytest.MonkeyPatch,
        write: Callable[[Path, dict[str, bytes]], Path],
    ) -> None:
        monkeypatch.setattr(mtfl_archive, "MAX_BYTES", 1_000_000)
        files[self.NAME] = bytes(1_000_001)
        with pytest.raises(
            DataError,
            match=r"line 3: 'AFLW/face_2\.jpg' has 1000001 bytes, expected at most 1000000",
        ):
            loaded(write(tmp_path / "data", files))

    @pytest.mark.parametrize("shift", [-1000, 1000, 9e5])
    def test_landmarks_far_outside(
        self, tmp_path: Path, files: dict[str, bytes], shift: float
    ) -> None:
        files["testing.txt"] = annotation(self.NAME, SHAPE + shift, (1, 1, 1, 1)).encode()
        with pytest.raises(
            DataError,
            match=r"testing\.txt line 1: the landmarks lie far outside the image 'AFLW/face_2\.jpg' of 120 x 120",
        ):
            loaded(write_zip(tmp_path / "data", files))

    def test_links_that_lead_out_of_the_folder(
        self, tmp_path: Path, files: dict[str, bytes]
    ) -> None:
        folder = write_folder(tmp_path / "data", files)
        (folder / self.NAME).rename(tmp_path / "outside.jpg")
        (folder / self.NAME).symlink_to(tmp_path / "outside.jpg")
        with pytest.raises(
            DataError, match=r"line 3: 'AFLW/face_2\.jpg': .* a link that leads out of it"
        ):
            loaded(folder)

    def test_a_link_to_the_folder_itself_is_followed(
        self, tmp_path: Path, files: dict[str, bytes]
    ) -> None:
        folder = write_folder(tmp_path / "data", files)
        (tmp_path / "link").symlink_to(folder)
        assert len(loaded(tmp_path / "link")["test_images"]) == NUM_TEST

    def test_without_pillow(self, archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "PIL", None)
        federation = make(0, archive)
        with pytest.raises(DataError, match=r'pip install "fedgradnorm\[mtfl\]"'):
            federation.check_data()

    def test_a_failed_load_leaves_no_cache(
        self, tmp_path: Path, files: dict[str, bytes], cache: Path
    ) -> None:
        folder = write_folder(tmp_path / "data", {**files, self.NAME: b""})
        with pytest.raises(DataError):
            loaded(folder)
        shutil.rmtree(folder)
        assert not cache.exists() or not list(cache.iterdir())


class TestMetrics:
    TRUE = torch.tensor([[0.0, 0.5, 0.25, 0.0, 0.5, 0.0, 0.0, 0.25, 0.5, 0.5]])

    def test_all_points_off_by_a_fifth_of_the_inter_ocular_distance(self) -> None:
        moved = self.TRUE + torch.tensor([0.06] * 5 + [0.08] * 5)
        assert LANDMARK_ERROR.function(moved, self.TRUE) == pytest.approx(0.2)
        assert FAILURE_RATE.function(moved, self.TRUE) == 1

    def test_one_point_off_counts_a_fifth(self) -> None:
        moved = self.TRUE.clone()
        moved[0, 2] += 0.2
        assert LANDMARK_ERROR.function(moved, self.TRUE) == pytest.approx(0.08)
        assert FAILURE_RATE.function(moved, self.TRUE) == 0

    def test_the_mean_over_faces(self) -> None:
        moved = self.TRUE + torch.tensor([0.06] * 5 + [0.08] * 5)
        both = torch.cat([moved, self.TRUE])
        assert LANDMARK_ERROR.function(both, self.TRUE.expand(2, 10)) == pytest.approx(0.1)
        assert FAILURE_RATE.function(both, self.TRUE.expand(2, 10)) == 0.5

    def test_it_does_not_depend_on_the_scale(self) -> None:
        moved = self.TRUE + 0.05
        small = LANDMARK_ERROR.function(moved / 7, self.TRUE / 7)
        assert small == pytest.approx(LANDMARK_ERROR.function(moved, self.TRUE), rel=1e-5)

    def test_directions_and_main_metrics(self) -> None:
        tasks = mtfl.tasks_for(0.5)
        assert tasks["landmarks"].metrics == (LANDMARK_ERROR, FAILURE_RATE)
        assert not LANDMARK_ERROR.higher_is_better
        assert LANDMARK_ERROR.percent
        assert tasks["pose"].main_metric.name == "accuracy"


@pytest.fixture(scope="module")
def real(
    mtfl_zip: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, np.ndarray]]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("FEDGRADNORM_CACHE", str(tmp_path_factory.mktemp("mtfl-cache")))
        yield loaded(mtfl_zip)


@pytest.mark.real_data
class TestRealData:
    def test_counts(self, real: dict[str, np.ndarray]) -> None:
        assert real["train_images"].shape == (10_000, 1, 40, 40)
        assert real["test_images"].shape == (2_995, 1, 40, 40)
        for split, expected in (("train", (5_807, 5_616, 1_408)), ("test", (1_173, 1_632, 241))):
            assert tuple((real[f"{split}_labels"][:, :3] == 0).sum(axis=0)) == expected
        assert np.bincount(real["train_labels"][:, 3]).tolist() == [136, 1_113, 7_445, 1_111, 195]
        assert (real["test_labels"][:, 3] == 2).sum() == 1_825

    def test_landmarks_lie_inside_every_crop(self, real: dict[str, np.ndarray]) -> None:
        for split in ("train", "test"):
            assert real[f"{split}_landmarks"].min() > 0.1
            assert real[f"{split}_landmarks"].max() < 0.9

    def test_the_head_starts_from_about_the_mean_face_and_the_loss_from_about_one(
        self, real: dict[str, np.ndarray]
    ) -> None:
        targets = torch.from_numpy(real["train_landmarks"])
        head = mtfl.LandmarkHead(4, margin=0.5)
        outputs = head.mean_face.expand_as(targets)
        assert (head.mean_face - targets.mean(dim=0)).abs().max() < 0.02
        assert mtfl.landmark_loss(outputs, targets).item() == pytest.approx(1, abs=0.25)

    def test_a_constant_guess_is_a_poor_one(self, real: dict[str, np.ndarray]) -> None:
        targets = torch.from_numpy(real["test_landmarks"])
        guess = torch.from_numpy(real["train_landmarks"].mean(axis=0)).expand_as(targets)
        assert 0.15 < LANDMARK_ERROR.function(guess, targets) < 0.25
        assert FAILURE_RATE.function(guess, targets) > 0.9

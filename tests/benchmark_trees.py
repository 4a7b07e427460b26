"""Small copies of every data layout, written from their published descriptions and not from the package's tables.

`write_tree("mvtec", root)` writes a tree and returns what a reader should find in it. Images are dark noise; an
anomalous one has a bright rectangle, which is also its mask.
"""

import csv
import json
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

MVTEC_CLASSES = [
    "bottle",
    "cable",
    "capsule",
    "carpet",
    "grid",
    "hazelnut",
    "leather",
    "metal_nut",
    "pill",
    "screw",
    "tile",
    "toothbrush",
    "transistor",
    "wood",
    "zipper",
]
VISA_CLASSES = [
    "candle",
    "capsules",
    "cashew",
    "chewinggum",
    "fryum",
    "macaroni1",
    "macaroni2",
    "pcb1",
    "pcb2",
    "pcb3",
    "pcb4",
    "pipe_fryum",
]
DTD_FOLDERS = [
    "Blotchy_099",
    "Fibrous_183",
    "Marbled_078",
    "Matted_069",
    "Mesh_114",
    "Perforated_037",
    "Stratified_154",
    "Woven_001",
    "Woven_068",
    "Woven_104",
    "Woven_125",
    "Woven_127",
]
SINGLE_SCAN = ("brain", "liver", "retina")
POLYP_SETS = ("clinicdb", "colondb", "cvc300", "kvasir")
ALL = ("mvtec", "visa", "btad", "rsdd", "dtd-synthetic", *SINGLE_SCAN, "headct", *POLYP_SETS, "endo")


@dataclass(frozen=True)
class Expected:
    """What a reader should find for one image: its path below the root, and all that follows from the layout."""

    image_path: str
    label: int
    class_name: str
    group: str
    mask: np.ndarray | None = None


class TreeWriter:
    """Writes images and masks below a root, and notes what a reader should find."""

    def __init__(self, root: Path, size: tuple[int, int]) -> None:
        self.root = root
        self.width, self.height = size
        self.expected: list[Expected] = []

    def image(self, path: str, label: int, class_name: str, mask: str | None = None, group: str | None = None) -> None:
        """Write an image that a reader should find, and its mask where a path for it is given."""
        region = self._region(path) if label else np.zeros((self.height, self.width), dtype=bool)
        self.unlisted(path, region)
        if mask is not None:
            self._save(Image.fromarray(region.astype(np.uint8) * 255), mask)
        known = region if mask is not None or not label else None
        self.expected.append(Expected(path, label, class_name, group or class_name, known))

    def unlisted(self, path: str, region: np.ndarray | bool = False) -> None:
        """Write an image that a reader of the test split should not find."""
        rng = np.random.default_rng(zlib.crc32(path.encode()))
        pixels = rng.integers(0, 100, (self.height, self.width, 3), dtype=np.uint8)
        pixels[np.broadcast_to(region, pixels.shape[:2])] = 250
        self._save(Image.fromarray(pixels), path)

    def _region(self, path: str) -> np.ndarray:
        rng = np.random.default_rng(zlib.crc32(b"region" + path.encode()))
        top, left = rng.integers(0, self.height // 2), rng.integers(0, self.width // 2)
        region = np.zeros((self.height, self.width), dtype=bool)
        region[top : top + self.height // 3, left : left + self.width // 3] = True
        return region

    def _save(self, image: Image.Image, path: str) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file)


def write_tree(
    name: str, root: Path, *, normal: int = 1, anomalous: int = 2, size: tuple[int, int] = (24, 18), form: str = "own"
) -> list[Expected]:
    """Write a small copy of a benchmark in its own layout, and return what a reader should find, sorted by path.

    Args:
        name: one of `ALL`.
        root: its root, made if need be.
        normal: normal test images a class folder; none are written where the benchmark has none.
        anomalous: anomalous test images a class folder.
        size: width and height of the images in pixels.
        form: "own", or "converted" for VisA in MVTec AD's layout.
    """
    tree = TreeWriter(root, size)
    writers = {
        "mvtec": _write_mvtec,
        "visa": _write_visa_converted if form == "converted" else _write_visa,
        "btad": _write_btad,
        "rsdd": _write_rsdd,
        "dtd-synthetic": _write_dtd,
        "headct": _write_headct,
        "endo": _write_endo,
        **dict.fromkeys(SINGLE_SCAN, _write_bmad),
        **dict.fromkeys(POLYP_SETS, _write_polyps),
    }
    writers[name](tree, name, normal, anomalous)
    return sorted(tree.expected, key=lambda expected: expected.image_path)


def _write_mvtec(tree: TreeWriter, name: str, normal: int, anomalous: int) -> None:
    for cls in MVTEC_CLASSES:
        tree.unlisted(f"{cls}/train/good/000.png")
        for i in range(normal):
            tree.image(f"{cls}/test/good/{i:03d}.png", 0, cls)
        for i in range(anomalous):
            defect = ("broken", "scratch")[i % 2]
            tree.image(f"{cls}/test/{defect}/{i:03d}.png", 1, cls, f"{cls}/ground_truth/{defect}/{i:03d}_mask.png")


def _write_visa(tree: TreeWriter, name: str, normal: int, anomalous: int) -> None:
    rows = []
    for cls in VISA_CLASSES:
        train = f"{cls}/Data/Images/Normal/9000.JPG"
        tree.unlisted(train)
        rows.append([cls, "train", "normal", train, ""])
        for i in range(normal):
            image = f"{cls}/Data/Images/Normal/{i:04d}.JPG"
            tree.image(image, 0, cls)
            rows.append([cls, "test", "normal", image, ""])
        for i in range(anomalous):
            image, mask = f"{cls}/Data/Images/Anomaly/{i:03d}.JPG", f"{cls}/Data/Masks/Anomaly/{i:03d}.png"
            tree.image(image, 1, cls, mask)
            rows.append([cls, "test", "anomaly", image, mask])
    table = tree.root / "split_csv/1cls.csv"
    table.parent.mkdir()
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([["object", "split", "label", "image", "mask"], *rows])


def _write_visa_converted(tree: TreeWriter, name: str, normal: int, anomalous: int) -> None:
    for cls in VISA_CLASSES:
        tree.unlisted(f"{cls}/train/good/9000.JPG")
        for i in range(normal):
            tree.image(f"{cls}/test/good/{i:04d}.JPG", 0, cls)
        for i in range(anomalous):
            tree.image(f"{cls}/test/bad/{i:03d}.JPG", 1, cls, f"{cls}/ground_truth/bad/{i:03d}.png")


def _write_btad(tree: TreeWriter, name: str, normal: int, anomalous: int) -> None:
    for cls, image, mask in (("01", "bmp", "png"), ("02", "png", "png"), ("03", "bmp", "bmp")):
        tree.unlisted(f"{cls}/train/ok/0000.{image}")
        for i in range(normal):
            tree.image(f"{cls}/test/ok/{i:04d}.{image}", 0, cls)
        for i in range(anomalous):
            tree.image(f"{cls}/test/ko/{i:04d}.{image}", 1, cls, f"{cls}/ground_truth/ko/{i:04d}.{mask}")


def _write_rsdd(tree: TreeWriter, name: str, normal: int, anomalous: int) -> None:
    for i in range(normal):
        tree.image(f"Metal15/test/good/{i}.bmp", 0, "Metal15")
    for i in range(anomalous):
        tree.image(f"Metal15/test/anomaly/{i}.bmp", 1, "Metal15", f"Metal15/ground_truth/anomaly/{i}.png")


def _write_dtd(tree: TreeWriter, name: str, normal: int, anomalous: int) -> None:
    for folder in DTD_FOLDERS:
        cls = folder.split("_")[0]
        for i in range(normal):
            tree.image(f"{folder}/test/good/{i:03d}.png", 0, cls, group=folder)
        for i in range(anomalous):
            mask = f"{folder}/ground_truth/bad/{i:03d}_mask.png"
            tree.image(f"{folder}/test/bad/{i:03d}.png", 1, cls, mask, group=folder)


def _write_bmad(tree: TreeWriter, name: str, normal: int, anomalous: int) -> None:
    for i in range(normal):
        tree.image(f"test/good/img/{i}.png", 0, name)
    for i in range(anomalous):
        tree.image(f"test/Ungood/img/{i}.png", 1, name, f"test/Ungood/label/{i}.png")


def _write_headct(tree: TreeWriter, name: str, normal: int, anomalous: int) -> None:
    for i in range(normal):
        tree.image(f"test/good/{i}.png", 0, name)
    for i in range(anomalous):
        tree.image(f"test/defect/{i}.png", 1, name)


def _write_polyps(tree: TreeWriter, name: str, normal: int, anomalous: int) -> None:
    for i in range(anomalous):
        tree.image(f"images/{i}.png", 1, name, f"masks/{i}.png")


def _write_endo(tree: TreeWriter, name: str, normal: int, anomalous: int) -> None:
    for i in range(anomalous):
        tree.image(f"test dataset/images/{i}.jpg", 1, name, f"test dataset/masks/{i}.jpg")


def write_jsonl(index: Path, rows: list[dict[str, object]]) -> None:
    """Write a released index file: an object a line."""
    index.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_folder(root: Path, *, normal: int = 2, anomalous: int = 2, masks: bool = True) -> list[Expected]:
    """Write a folder of one's own: `normal/`, and unless there are none `abnormal/` and `masks/`."""
    tree = TreeWriter(root, (24, 18))
    for i in range(normal):
        tree.image(f"normal/{i}.png", 0, "object")
    for i in range(anomalous):
        tree.image(f"abnormal/{i}.jpg", 1, "object", f"masks/{i}.png" if masks else None)
    return sorted(tree.expected, key=lambda expected: expected.image_path)

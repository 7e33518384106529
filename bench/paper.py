"""Figures of the CFLOW-AD paper (Gudovskiy, Ishizaka and Kozuka, WACV 2022, arXiv 2107.12571), by table.

Only what could be checked is here, and how it was checked is said beside it; everything else is None, shown as
"not found". The figures of Table 3 are those in the authors' repository (images/fig-table.svg), whose averages
are the abstract's. They are the best epoch on the test set, at an image size chosen for each class on that set.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

MISSING = "not found"
AUTHORS_FIGURE = "the authors' repository"
COUNTED = "reproduced by counting within 3%, with or without the encoder"
RATIO = "consistent with the 8x to 25x over PaDiM that summaries of the paper state"


@dataclass(frozen=True)
class Accuracy:
    """Table 3, a class and method: AUROC of images, AUROC of pixels and AUPRO, in percent."""

    image_auroc: float | None
    pixel_auroc: float
    aupro: float | None


@dataclass(frozen=True)
class ClassRow:
    """Table 3's row of an MVTec AD class, and the image size that its authors' command trains at."""

    cflow: Accuracy  # these three with WideResNet-50
    padim: Accuracy
    spade: Accuracy
    cflow_resnet18: Accuracy
    size: int

    @property
    def by_method(self) -> dict[str, Accuracy]:
        """With WideResNet-50."""
        return {"cflow-fast": self.cflow, "padim": self.padim, "spade": self.spade}

    def figures(self, method: str, encoder: str) -> Accuracy | None:
        """With WideResNet-50, but CFLOW-AD's with ResNet-18 for that encoder. None: the paper has no such method."""
        if method == "cflow-fast" and encoder.startswith("resnet18"):
            return self.cflow_resnet18
        return self.by_method.get(method)


@dataclass(frozen=True)
class Cost:
    """Table 6, a model: images a second at 256 and 512 px, and its size in megabytes (10^6 bytes) on both data sets."""

    fps_256: float | None = None
    fps_512: float | None = None
    megabytes_stc: float | None = None
    megabytes_mvtec: float | None = None
    evidence: str = MISSING

    def fps(self, size: int) -> float | None:
        return {256: self.fps_256, 512: self.fps_512}.get(size)


def _row(
    cflow: tuple[float, float, float],
    padim: tuple[float, float],
    spade: tuple[float, float],
    cflow_resnet18: tuple[float, float],
    size: int,
) -> ClassRow:
    return ClassRow(
        Accuracy(*cflow),
        Accuracy(None, *padim),
        Accuracy(None, *spade),
        Accuracy(*cflow_resnet18, None),
        size,
    )


TABLE_3 = {
    "bottle": _row((100.0, 98.98, 96.80), (98.3, 94.8), (98.4, 95.5), (100.0, 98.64), 512),
    "cable": _row((97.59, 97.64, 93.53), (96.7, 88.8), (97.2, 90.9), (97.62, 96.75), 256),
    "capsule": _row((97.68, 98.98, 93.40), (98.5, 93.5), (99.0, 93.7), (93.15, 98.62), 256),
    "carpet": _row((98.73, 99.25, 97.70), (99.1, 96.2), (97.5, 94.7), (98.20, 99.29), 512),
    "grid": _row((99.60, 98.99, 96.08), (97.3, 94.6), (93.7, 86.7), (98.97, 98.53), 512),
    "hazelnut": _row((99.98, 98.89, 96.68), (98.2, 92.6), (99.1, 95.4), (99.91, 98.81), 256),
    "leather": _row((100.0, 99.66, 99.35), (98.9, 88.8), (97.6, 97.2), (100.0, 99.51), 512),
    "metal_nut": _row((99.26, 98.56, 91.65), (97.2, 85.6), (98.1, 94.4), (98.45, 97.59), 256),
    "pill": _row((96.82, 98.95, 95.39), (95.7, 92.7), (96.5, 94.6), (93.02, 98.34), 256),
    "screw": _row((91.89, 98.86, 95.30), (98.5, 94.4), (98.9, 96.0), (85.94, 98.40), 512),
    "tile": _row((99.88, 98.01, 94.34), (94.1, 86.0), (87.4, 75.9), (98.40, 95.80), 512),
    "toothbrush": _row((99.65, 98.93, 95.06), (98.8, 93.1), (97.9, 93.5), (99.86, 99.00), 512),
    "transistor": _row((95.21, 97.99, 81.40), (97.5, 84.5), (94.1, 87.4), (93.04, 97.69), 128),
    "wood": _row((99.12, 96.65, 95.79), (94.9, 91.1), (88.5, 97.4), (98.59, 95.00), 512),
    "zipper": _row((98.48, 99.08, 96.60), (98.5, 95.9), (96.5, 92.6), (96.15, 98.98), 512),
}

TABLE_6 = {
    ("encoder", "resnet18"): Cost(megabytes_stc=45, megabytes_mvtec=45, evidence=COUNTED),
    ("encoder", "wide_resnet50_2"): Cost(megabytes_stc=268, megabytes_mvtec=268, evidence=COUNTED),
    ("encoder", "mobilenetv3_large_100"): Cost(megabytes_stc=12, megabytes_mvtec=12, evidence=COUNTED),
    ("padim", "resnet18"): Cost(4.4, None, 210, 170, f"size {COUNTED}; speed {RATIO}"),
    ("padim", "wide_resnet50_2"): Cost(1.1, None, 5200, 3800, f"size {COUNTED}; speed {RATIO}"),
    ("spade", "wide_resnet50_2"): Cost(None, None, 37000, 1400, COUNTED),
    ("cflow", "resnet18"): Cost(34, None, 96, 96, f"size {COUNTED}; speed {RATIO}"),
    ("cflow", "wide_resnet50_2"): Cost(27, None, 947, 947, f"size {COUNTED}; speed {RATIO}"),
    ("cflow", "mobilenetv3_large_100"): Cost(megabytes_stc=25, megabytes_mvtec=25, evidence=COUNTED),
}

TABLE_2 = MISSING
"""The ablation's figures."""

TABLE_1 = MISSING
"""The complexity formulas as the paper prints them; what it says of memory is in CAPTION_1."""

CAPTION_1 = (
    "SPADE keeps a gallery for its nearest neighbours, PaDiM a covariance matrix for every position, "
    "CFLOW-AD the decoders' weights; all use the same encoder"
)

BEST_EPOCH = (
    "The paper's figures are the best epoch on the test set, at an image size chosen for each class; "
    "ours are the last step, at one size."
)


def conditions(categories: Iterable[str]) -> str:
    """The encoders of Table 3's figures and each category's image size; what it lacks is not found."""
    known = [name for name in dict.fromkeys(categories) if name in TABLE_3]
    if not known:
        return f"the paper's figures: {MISSING} for this category"
    sizes = ", ".join(f"{TABLE_3[name].size} px ({name})" for name in known)
    encoders = "with WideResNet-50, but CFLOW-AD's with ResNet-18 beside ResNet-18"
    return f"the paper's figures are {encoders}; its CFLOW-AD at {sizes}"

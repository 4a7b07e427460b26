"""The 14 benchmarks of zero-shot anomaly detection: names, classes, prompts, sizes and published results.

Everything here is data that needs no heavy import. All results are percentages; None where nothing was published.
"""

import difflib
import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from moeclip_hf.data.layouts import BMAD, BTAD, ENDO, HEADCT, MVTEC, POLYPS, Layout, VisaTable
from moeclip_hf.errors import DatasetError, MoECLIPWarning

Domain = Literal["industrial", "medical"]

FALLBACK_PROMPT_NAME = "object"
"""Fills the prompts where a class has no name."""


@dataclass(frozen=True)
class Results:
    """Image and pixel AUROC and average precision, in percent; None where not known or not defined."""

    image_auroc: float | None = None
    image_ap: float | None = None
    pixel_auroc: float | None = None
    pixel_ap: float | None = None


@dataclass(frozen=True)
class AblationResult:
    """A variant's mean pixel and image AUROC in percent, over the four benchmarks of `ABLATION_BENCHMARKS`."""

    variant: str
    pixel_auroc: float
    image_auroc: float


@dataclass(frozen=True, eq=False)
class Benchmark:
    """What is known about one benchmark.

    Attributes:
        name: the name used throughout this package.
        aliases: names that index files and downloaded archives use for it, the released index file's first.
        domain: "industrial" or "medical"; decides the blur of the maps and the fusion of the image score.
        classes: class name -> the name that fills the prompts.
        layouts: the trees it comes in, the first that is found is read.
        normal: number of normal test images.
        anomalous: number of anomalous test images.
        has_masks: whether anomalous test images have masks.
        groups: number of groups that results are averaged over; classes, but for DTD-Synthetic its 12 texture folders.
        published: the paper's results.
        reproduced: results of the released code, run independently with one seed.
    """

    name: str
    aliases: tuple[str, ...]
    domain: Domain
    classes: Mapping[str, str]
    layouts: tuple[Layout, ...]
    normal: int
    anomalous: int
    has_masks: bool
    groups: int
    published: Results
    reproduced: Results

    def class_name(self, folder: str) -> str:
        """The class of a class folder: its name up to the first `_` and three digits; for no folder the only class."""
        return re.split(r"_\d{3}", folder, maxsplit=1)[0] if folder else next(iter(self.classes))

    def known_class(self, class_name: str) -> str:
        """The benchmark's own spelling of a class that another source may spell otherwise (case, `Name_NNN`).

        Any name stands for the only class of a benchmark that has one; an unknown class of others keeps its name.
        """
        if len(self.classes) == 1:
            return next(iter(self.classes))
        name = self.class_name(class_name)
        return next((known for known in self.classes if known.lower() == name.lower()), name)

    def prompt_name(self, class_name: str) -> str:
        """What fills the prompts of a class, in any spelling; an unknown class's own name, with blanks for `_`."""
        name = self.known_class(class_name)
        return self.classes.get(name, plain_prompt_name(name))

    def is_name(self, name: str) -> bool:
        """Whether this is the benchmark's name or an alias, whatever the case, hyphens, underscores and blanks."""
        return find_benchmark(name) is self

    def is_own(self, prompt_names: Collection[str], domain: str) -> bool:
        """Whether images under these prompts, in this domain, are scored as this benchmark's are."""
        return domain == self.domain and set(prompt_names) <= set(self.classes.values())

    def columns(self, class_name: str, folder: str) -> dict[str, str]:
        """The text columns of an image's row, from its class and its class folder (empty where classes have none)."""
        class_name = self.known_class(class_name)
        if class_name not in self.classes:
            text = f"{self.name} has no class '{class_name}': its prompts say '{self.prompt_name(class_name)}'"
            warnings.warn(text, MoECLIPWarning, stacklevel=2)
        return {
            "class_name": class_name,
            "prompt_name": self.prompt_name(class_name),
            "group": folder if folder and self.groups > len(self.classes) else class_name,
            "dataset": self.name,
            "domain": self.domain,
        }


def columns_of(dataset: str, class_name: str, folder: str, domain: Domain) -> dict[str, str]:
    """The text columns of an image's row: the benchmark's if `dataset` names one, else taken from the class alone."""
    benchmark = find_benchmark(dataset)
    return benchmark.columns(class_name, folder) if benchmark else plain_columns(dataset, class_name, domain)


def plain_columns(dataset: str, class_name: str, domain: Domain) -> dict[str, str]:
    """The text columns of an image's row in a data set that is no benchmark."""
    return {
        "class_name": class_name,
        "prompt_name": plain_prompt_name(class_name),
        "group": class_name,
        "dataset": dataset,
        "domain": domain,
    }


def plain_prompt_name(class_name: str) -> str:
    """The prompt name of a class that no benchmark knows: its own name with blanks for underscores."""
    return class_name.replace("_", " ").strip() or FALLBACK_PROMPT_NAME


def find_benchmark(name: str) -> Benchmark | None:
    """The benchmark of this name or alias, as `get_benchmark` finds it; None if there is none."""
    return _BY_KEY.get(_key(name))


def get_benchmark(name: str) -> Benchmark:
    """The benchmark of this name or alias, whatever the case, hyphens, underscores and blanks.

    Raises:
        DatasetError: no such benchmark; the message has the nearest name and all there are.
    """
    benchmark = find_benchmark(name)
    if benchmark is None:
        near = difflib.get_close_matches(_key(name), _BY_KEY, n=1)
        hint = f"did you mean '{_BY_KEY[near[0]].name}'? " if near else ""
        raise DatasetError(f"unknown benchmark '{name}': {hint}Known are {', '.join(BENCHMARKS)}")
    return benchmark


def _key(name: str) -> str:
    return re.sub(r"[-_ ]", "", name.lower())


_UNKNOWN = Results()


def _benchmark(
    name: str,
    aliases: tuple[str, ...],
    domain: Domain,
    classes: dict[str, str],
    layouts: tuple[Layout, ...],
    counts: tuple[int, int],
    published: Results = _UNKNOWN,
    reproduced: Results = _UNKNOWN,
    has_masks: bool = True,
    groups: int | None = None,
) -> Benchmark:
    return Benchmark(
        name=name,
        aliases=aliases,
        domain=domain,
        classes=MappingProxyType(classes),
        layouts=layouts,
        normal=counts[0],
        anomalous=counts[1],
        has_masks=has_masks,
        groups=groups or len(classes),
        published=published,
        reproduced=reproduced,
    )


_MVTEC_CLASSES = {
    "bottle": "dark bottle",
    "cable": "top view of three cables",
    "capsule": "black asd orange capsule",  # (sic): the published checkpoints were trained and scored with it
    "carpet": "gray carpet",
    "grid": "metal or plastic mesh",
    "hazelnut": "single brown hazelnut",
    "leather": "brown leather",
    "metal_nut": "metal nut which has four notched edges",
    "pill": "oval white pill with small red speckles and the letters 'FF' engraved",
    "screw": "screw",
    "tile": "speckled tile surface",
    "toothbrush": "toothbrush head",
    "transistor": "a three-legged transistor placed vertically",
    "wood": "wood surface",
    "zipper": "a black zipper",
}

_VISA_CLASSES = {
    "candle": "candle",
    "capsules": "capsules",
    "cashew": "cashew nut",
    "chewinggum": "chewing gum",
    "fryum": "wheel-shaped fryum snack",
    "macaroni1": "orange macaroni",
    "macaroni2": "scattered yellow macaroni",
    "pcb1": "dual ultrasonic distance sensor pcb module",
    "pcb2": "integrated circuits board",
    "pcb3": "infrared sensor pcb module",
    "pcb4": "battery charging pcb module",
    "pipe_fryum": "pipe-shaped fryum",
}

_BTAD_CLASSES = {
    "01": "Bright concentric rings in neon yellow and blue tones against a dark blue background, resembling a "
    "stylized wave or energy field radiating outward.",
    "02": "vertical fabric lines in warm, dusty pink and beige tones",
    "03": "oval concentric circular rings in gradient shades of blue and white",
}

_DTD_CLASSES = ("Blotchy", "Fibrous", "Marbled", "Matted", "Mesh", "Perforated", "Stratified", "Woven")

_COLON = "colon endoscopy image"


def _index(benchmarks: Iterable[Benchmark]) -> Mapping[str, Benchmark]:
    return MappingProxyType({benchmark.name: benchmark for benchmark in benchmarks})


BENCHMARKS: Mapping[str, Benchmark] = _index(
    [
        _benchmark(
            "mvtec",
            ("MVTec", "MVTec-AD", "mvtec_anomaly_detection"),
            "industrial",
            _MVTEC_CLASSES,
            (MVTEC,),
            (467, 1258),
            published=Results(93.9, 96.8, 92.5, 45.7),
            reproduced=Results(93.4, 96.6, 91.7, 45.3),
        ),
        _benchmark(
            "visa",
            ("VisA", "VisA_20220922", "VisA_pytorch"),
            "industrial",
            _VISA_CLASSES,
            (VisaTable(), MVTEC),
            (962, 1200),
            published=Results(83.6, 86.2, 95.6, None),
            reproduced=Results(81.7, 83.7, 94.6, 23.5),
        ),
        _benchmark(
            "btad",
            ("BTAD", "BTech_Dataset_transformed"),
            "industrial",
            _BTAD_CLASSES,
            (BTAD,),
            (451, 290),
            published=Results(93.1, 98.0, 96.8, 50.4),
            reproduced=Results(91.6, 93.8, 96.5, 46.2),
        ),
        _benchmark(
            "rsdd",
            ("RSDD",),
            "industrial",
            {"Metal15": "metal"},
            (MVTEC,),
            (387, 387),
            published=Results(95.3, 95.1, 99.7, None),
            reproduced=Results(93.9, 91.1, 99.7, 34.6),
        ),
        _benchmark(
            "dtd-synthetic",
            ("DTD-Synthetic", "DTD"),
            "industrial",
            {name: name for name in _DTD_CLASSES},
            (MVTEC,),
            (357, 947),
            published=Results(95.5, 98.6, 98.8, None),
            reproduced=Results(96.4, 98.6, 98.3, 62.1),
            groups=12,
        ),
        _benchmark(
            "brain",
            ("Brain", "Brain_AD"),
            "medical",
            {"brain": "scan"},
            (BMAD,),
            (640, 3075),
            published=Results(88.5, 97.1, 97.3, 61.3),
            reproduced=Results(78.5, 93.8, 94.8, 39.1),
        ),
        _benchmark(
            "liver",
            ("Liver", "Liver_AD"),
            "medical",
            {"liver": "scan"},
            (BMAD,),
            (833, 660),
            published=Results(74.0, 64.6, None, None),
            reproduced=Results(63.6, 56.9, 97.6, 8.6),
        ),
        _benchmark(
            "retina",
            ("Retina", "RESC", "Retina_RESC", "Retina_RESC_AD"),
            "medical",
            {"retina": "scan"},
            (BMAD,),
            (1041, 764),
            published=Results(85.5, 84.9, None, None),
            reproduced=Results(86.1, 84.7, 95.8, 65.0),
        ),
        _benchmark(
            "headct",
            ("headct", "HeadCT", "HeadCT_anomaly_detection"),
            "medical",
            {"headct": "scan"},
            (HEADCT,),
            (100, 100),
            published=Results(96.6, 94.5, None, None),
            reproduced=Results(94.1, 93.1, None, None),
            has_masks=False,
        ),
        _benchmark(
            "clinicdb",
            ("Colon_clinicDB", "CVC-ClinicDB"),
            "medical",
            {"clinicdb": _COLON},
            (POLYPS,),
            (0, 612),
            published=Results(None, None, 89.7, 49.9),
            reproduced=Results(None, None, 89.1, 48.5),
        ),
        _benchmark(
            "colondb",
            ("Colon_colonDB", "CVC-ColonDB"),
            "medical",
            {"colondb": _COLON},
            (POLYPS,),
            (0, 380),
            published=Results(None, None, 85.4, 34.8),
            reproduced=Results(None, None, 84.5, 33.9),
        ),
        _benchmark(
            "cvc300",
            ("Colon_cvc300", "CVC-300"),
            "medical",
            {"cvc300": _COLON},
            (POLYPS,),
            (0, 60),
            reproduced=Results(None, None, 96.8, 53.8),
        ),
        _benchmark(
            "kvasir",
            ("Colon_Kvasir", "Kvasir-SEG"),
            "medical",
            {"kvasir": _COLON},
            (POLYPS,),
            (0, 1000),
            published=Results(None, None, 88.1, 57.6),
            reproduced=Results(None, None, 87.1, 55.5),
        ),
        _benchmark(
            "endo",
            ("Endo",),
            "medical",
            {"endo": "polyp"},
            (ENDO, POLYPS),
            (0, 200),
            reproduced=Results(None, None, 90.1, 59.8),
        ),
    ]
)
"""All benchmarks by name, industrial ones first."""

PUBLISHED_MEAN = Results(89.6, 90.6, 94.3, 47.5)
"""The paper's means: image level over the 9 benchmarks with normal images, pixel level over the 13 with masks."""

REPRODUCED_MEAN = Results(86.6, 88.0, 93.6, 44.3)
"""The same means of the released code, run independently with one seed."""

ABLATION_BENCHMARKS = ("mvtec", "dtd-synthetic", "headct", "colondb")

ABLATION = (
    AblationResult("full", 92.2, 95.3),
    AblationResult("without ETF", 91.7, 94.1),
    AblationResult("without FOFS", 91.9, 93.9),
    AblationResult("without FOFS and ETF", 91.2, 93.1),
    AblationResult("without PAA", 90.7, 93.5),
    AblationResult("without depth-wise adapter", 91.7, 93.6),
    AblationResult("plain CLIP", 40.6, 67.4),
)
"""The paper's ablation over `ABLATION_BENCHMARKS`."""

EXPERT_SIMILARITY: Mapping[str, float] = MappingProxyType(
    {"plain mixture": 0.45, "with FOFS": 0.24, "with FOFS and ETF": 0.02}
)
"""The paper's mean cosine between the experts' outputs."""

_BY_KEY: Mapping[str, Benchmark] = {
    _key(name): benchmark for benchmark in BENCHMARKS.values() for name in (benchmark.name, *benchmark.aliases)
}

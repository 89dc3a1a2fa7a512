"""Which metrics there are. A new one takes a function in `metrics.distances` and an entry of KINDS here."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from metrics.distances import frechet_distance, inception_score, kernel_distance, precision_recall

DETECTORS = ("fid", "fd_dinov2", "fd_demo")  # `metrics.features.detectors` loads them; each names its Fréchet distance
DEFAULT_DETECTOR = "fid"  # of kid, pr and is

Outcome = tuple[float, dict[str, float]]  # a metric's value, and what else is to be told of it


@dataclass(frozen=True)
class Kind:
    """How a metric is taken of images in a detector's features. `needs` says what `compute` is given: "moments" (mean
    [D] and covariance [D,D] of the images, then of the reference), "features" ([N,D] of the images, then [M,D] of the
    reference), or "logits" ([N,classes] of the images).
    """

    needs: str
    compute: Callable[..., Outcome]


def _kernel(images: Tensor, reference: Tensor) -> Outcome:
    mean, std = kernel_distance(images, reference)
    return mean, {"std": std, "subsets": 100, "subset_size": min(1000, len(reference), len(images))}


def _precision_recall(images: Tensor, reference: Tensor) -> Outcome:
    result = precision_recall(reference, images)
    return result.precision, {"recall": result.recall, "k": 3, "reference_features": len(reference)}


def _inception(logits: Tensor) -> Outcome:
    # In blocks of random images: data sets are often sorted by class, and a block of one class scores 1.
    mean, std = inception_score(logits[torch.randperm(len(logits), generator=torch.Generator().manual_seed(0))])
    return mean, {"std": std, "splits": 10}


KINDS = {
    "fd": Kind("moments", lambda *moments: (frechet_distance(*moments), {})),
    "kid": Kind("features", _kernel),
    "pr": Kind("features", _precision_recall),
    "is": Kind("logits", _inception),
}


@dataclass(frozen=True)
class Metric:
    """One number (or two) of a report: what is computed, in whose features."""

    name: str  # in reports
    kind: str  # key of KINDS
    detector: str

    @property
    def needs(self) -> str:
        """ "moments", "features" or "logits" of its detector; logits are compared with no reference."""
        return KINDS[self.kind].needs


def parse_metrics(text: str, custom: tuple[str, ...] = ()) -> list[Metric]:
    """Read a list such as `fid,fd_dinov2,kid,pr:fd_demo`; `custom` names detectors that were given as files. fid,
    fd_dinov2, fd_demo and fd:NAME are Fréchet distances; kid, pr (precision and recall) and is (inception score) are
    taken in Inception features unless `:DETECTOR` says otherwise. Raises ValueError for anything else.
    """
    metrics: dict[str, Metric] = {}
    known = (*DETECTORS, *custom)
    for item in filter(None, (part.strip() for part in text.split(","))):
        kind, _, detector = ("fd", "", item) if item in known else item.partition(":")
        if kind not in KINDS or (kind == "fd" and not detector):
            use = ", ".join((*DETECTORS, *(name for name in KINDS if name != "fd"), *custom))
            raise ValueError(f"no metric {item!r}: use {use} (kid:fd_demo and so on)")
        detector = detector or DEFAULT_DETECTOR
        if detector not in known:
            raise ValueError(f"metric {item!r}: no detector {detector!r}; there are {', '.join(known)}")
        name = kind if detector == DEFAULT_DETECTOR else f"{kind}:{detector}"
        if kind == "fd":
            name = detector if detector in DETECTORS else f"fd_{detector}"
        metrics[name] = Metric(name, kind, detector)
    if not metrics:
        raise ValueError("no metric is named: use a list such as fid,fd_dinov2")
    return list(metrics.values())

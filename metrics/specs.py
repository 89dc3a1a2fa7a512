"""Which metrics there are, and in which detector's features each is taken."""

from __future__ import annotations

from dataclasses import dataclass

KINDS = ("fd", "kid", "pr", "is")
STANDARD = {"fid": ("fd", "fid"), "fd_dinov2": ("fd", "fd_dinov2"), "fd_demo": ("fd", "fd_demo")}
DEFAULT_DETECTOR = "fid"  # of kid, pr and is


@dataclass(frozen=True)
class Metric:
    """One number (or two) of a report: what is computed, in whose features."""

    name: str  # in reports
    kind: str  # fd (Fréchet distance), kid, pr (precision and recall), is (inception score)
    detector: str

    @property
    def needs_features(self) -> bool:
        """Whether single features are needed, of both sides, and not only their moments."""
        return self.kind in ("kid", "pr")


def parse_metrics(text: str, custom: tuple[str, ...] = ()) -> list[Metric]:
    """Read a list such as `fid,fd_dinov2,kid,pr:fd_demo`; `custom` names detectors that were given as files.

    fid, fd_dinov2, fd_demo and fd:NAME are Fréchet distances; kid, pr (precision and recall) and is (inception score)
    are taken in Inception features unless `:DETECTOR` says otherwise. Raises ValueError for anything else.
    """
    metrics: dict[str, Metric] = {}
    for item in (part.strip() for part in text.split(",")):
        if not item:
            continue
        kind, _, detector = item.partition(":")
        if not detector and item in STANDARD:
            metric = Metric(item, *STANDARD[item])
        elif not detector and item in custom:
            metric = Metric(f"fd_{item}", "fd", item)
        elif kind in KINDS and (detector or kind != "fd"):
            detector = detector or DEFAULT_DETECTOR
            known = [d for _, d in STANDARD.values()]
            if detector not in (*known, *custom):
                raise ValueError(f"metric {item!r}: no detector {detector!r}; there are {', '.join((*known, *custom))}")
            standard = [name for name, value in STANDARD.items() if value == (kind, detector)]
            short = kind if detector == DEFAULT_DETECTOR else f"{kind}:{detector}"
            metric = Metric(standard[0] if standard else f"fd_{detector}" if kind == "fd" else short, kind, detector)
        else:
            own = f", {', '.join(custom)}" if custom else ""
            raise ValueError(f"no metric {item!r}: use {', '.join(STANDARD)}, kid, pr, is{own} (kid:fd_demo and so on)")
        metrics[metric.name] = metric
    if not metrics:
        raise ValueError("no metric is named: use a list such as fid,fd_dinov2")
    return list(metrics.values())

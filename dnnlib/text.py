"""Counts, durations and one-line texts. Imports no third-party package, so that scripts start fast."""

import re

_SI_FACTORS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def parse_si(text: str | int) -> int:
    """Parses a count: "64Mi" is 67108864, "0.5Ki" 512, "2k" 2000, upper or lower case. Raises ValueError for others."""
    match = re.fullmatch(r"(\d{1,18}(?:\.(\d{1,18}))?)([kmg]i?)?", str(text).strip().lower())
    if match is None:
        raise ValueError(f"{text!r} is not a count: write a whole number such as 200, 16Ki, 64Mi or 2K")
    digits, fraction, suffix = match[1].replace(".", ""), match[2] or "", match[3] or ""
    value, rest = divmod(int(digits) * _SI_FACTORS[suffix], 10 ** len(fraction))
    if rest:
        raise ValueError(f"{text!r} is not a whole number")
    return value


def format_time(seconds: float) -> str:
    """Formats a duration with its two leading units: 42s, 3m 07s, 5h 02m, 2d 04h."""
    s = max(int(round(seconds)), 0)
    for unit, length, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if s >= length:
            return f"{s // length}{unit} {s % length // part:02d}{smaller}"
    return f"{s}s"


def parse_duration(text: str) -> float:
    """Seconds of "11h30m", "90m", "2d", "1h 5m 30s", or a number of them. Raises ValueError for anything else."""
    compact = re.sub(r"\s+", "", str(text).lower())
    units = {"d": 86400, "h": 3600, "m": 60, "s": 1}
    number = r"\d{1,9}(?:\.\d{1,9})?"
    if re.fullmatch(number, compact):
        return float(compact)
    if not compact or not re.fullmatch("".join(f"(?:{number}{unit})?" for unit in units), compact):
        raise ValueError(f"{text!r} is not a length of time: write days, hours, minutes and seconds, as in 11h30m")
    return sum(float(value) * units[unit] for value, unit in re.findall(f"({number})([dhms])", compact))


def format_bytes(count: float) -> str:
    """Formats a number of bytes in powers of 1024: 512 B, 1.5 KiB, 2.3 GiB."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while abs(count) >= 1024 and len(units) > 1:
        count /= 1024
        del units[0]
    return f"{int(count)} B" if units[0] == "B" else f"{count:.1f} {units[0]}"


def first_line(error: object) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].strip()


def printable(text: object) -> str:
    """One line of at most 300 characters that a terminal can show."""
    return "".join(c if c.isprintable() else " " for c in str(text))[:300].strip()


def redact(text: object) -> str:
    """The text, its URLs without user name, password, query and fragment (but `#sha256=`), to be shown and kept."""
    user = r"(?:[^\s/?#]*@|[^\s/?#@:\[]*:(?!\d*(?:[/?#\s]|$))[^\s@]*@)?"  # a password may hold unescaped / ? #
    rest = r"""(?:[?#](?!(?<=#)sha256=)[^\s#]*?(?=[:;,.)'"]*(?:[\s#]|$)))*"""  # without marks of the sentence around
    return re.sub(rf"(\w://){user}([^\s?#]*){rest}", r"\1\2", str(text))

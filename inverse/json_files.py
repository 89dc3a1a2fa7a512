"""The JSON files of an output folder: read with care, since users edit and copy them, and written whole."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from dnnlib.util import atomic_write

_MAX_BYTES = 1 << 28


class JsonFileError(ValueError):
    """A JSON file is missing, damaged or not an object; the message is one line that names it."""


def read_json(path: Path, advice: str) -> dict[str, Any]:
    """Return the object in a JSON file. Raises JsonFileError, which ends in `advice`, where it cannot be had."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise JsonFileError(f"{path}: larger than such a file can be; {advice}")
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise JsonFileError(f"{path}: missing; {advice}") from None
    except OSError as error:
        raise JsonFileError(f"{path}: cannot be read ({error.strerror})") from None
    except JsonFileError:
        raise
    except (ValueError, RecursionError) as error:
        raise JsonFileError(f"{path}: damaged, not JSON ({str(error)[:100]}); {advice}") from None
    if not isinstance(content, dict):
        raise JsonFileError(f"{path}: damaged, must hold a JSON object, not {type(content).__name__}; {advice}")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON data, infinities as null; the file appears whole or not."""
    with atomic_write(path, "w", encoding="utf-8") as file:
        json.dump(_finite(content), file, indent=1)
        file.write("\n")


def _finite(value: Any) -> Any:
    """JSON has no infinities: null instead."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

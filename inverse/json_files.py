"""The JSON files of an output folder, read with care, since users edit and copy them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dnnlib.files import read_regular

_MAX_BYTES = 1 << 28


class JsonFileError(ValueError):
    """A JSON file is missing, damaged or not an object; the message is one line that names it."""


def read_json(path: Path, advice: str) -> dict[str, Any]:
    """Return the object in a JSON file. Raises JsonFileError, which ends in `advice`, where it cannot be had."""
    try:
        content = json.loads(read_regular(path, _MAX_BYTES))
    except FileNotFoundError:
        raise JsonFileError(f"{path}: missing; {advice}") from None
    except OSError as error:
        raise JsonFileError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise JsonFileError(f"{path}: damaged, not JSON ({str(error)[:100]}); {advice}") from None
    if not isinstance(content, dict):
        raise JsonFileError(f"{path}: damaged, must hold a JSON object, not {type(content).__name__}; {advice}")
    return content

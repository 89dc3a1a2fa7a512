"""From exceptions to what a script says about them. Imports no PyTorch, so that scripts still answer --help at once."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class MainProcessError(ValueError):
    """The main process failed, and has said or will say why; raised in the others, so that they end too."""


@contextmanager
def user_errors(batch_option: str = "--batch") -> Iterator[None]:
    """Turn errors that the user can mend into one line and exit code 1, and leave the process group at the end.

    Bad input (ValueError, OSError) is told in its own words; where memory runs out, on the GPU or not, the advice names
    `batch_option`. Any other exception is a defect and passes. Raises click.ClickException, or SystemExit in processes
    that failed only because the main one did.
    """
    import click

    try:
        yield
    except MainProcessError:
        sys.exit(1)  # one message is enough
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise click.ClickException(f"out of memory: try a smaller {batch_option} ({reason})") from error
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    finally:
        if "torch" in sys.modules:  # without it no group was joined
            from torch_utils import distributed

            distributed.destroy()


def _out_of_memory(error: MemoryError | RuntimeError) -> bool:
    import torch

    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)

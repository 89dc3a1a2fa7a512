"""Training commands on the tiny problem, run in this process, and what they say to mistakes."""

from click.testing import CliRunner

SMALL = ["--batch=8", "--batch-gpu=8", "--status=8", "--checkpoint=16", "--snapshot=8", "--rampup-mimg=0"]


SMALL_NET = [
    "--model-channels=16",
    "--channel-mult=1,2",
    "--num-blocks=1",
    "--attn-resolutions=4",
    "--channels-per-head=16",
]


def run(script, *arguments):
    common = ["--device", "cpu", "--quiet"]
    return CliRunner().invoke(script.main, [str(argument) for argument in arguments] + common)


def mistake(script, *arguments):
    """The one line that a mistake ends in, with click's usage hint before it at most."""
    result = run(script, *arguments)
    assert result.exit_code not in (0, None), result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1 and result.stderr.rstrip().endswith(lines[0]), result.stderr
    return lines[0]


def replaced(arguments, **changes):
    """The same arguments with other values of some options."""
    arguments = list(arguments)
    for name, value in changes.items():
        arguments[arguments.index(f"--{name}") + 1] = value
    return arguments

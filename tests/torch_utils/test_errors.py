import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
import torch

from torch_utils import distributed, errors
from torch_utils.errors import user_errors

ROOT = Path(__file__).parents[2]


def allocate():
    torch.empty(1 << 60, dtype=torch.uint8)


def fail(error):
    def action():
        raise error

    return action


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (fail(ValueError("no such network")), "no such network"),
        (fail(FileNotFoundError(2, "No such file", "a.png")), "a.png"),
        (fail(torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")), "smaller --batch-gpu (CUDA out of"),
        (fail(MemoryError()), "smaller --batch-gpu (MemoryError)"),
        (allocate, "out of memory: try a smaller --batch-gpu ("),
    ],
)
def test_what_users_can_mend_is_told_in_one_line(action, message):
    with pytest.raises(click.ClickException) as error, user_errors("--batch-gpu"):
        action()
    assert message in error.value.message and "\n" not in error.value.message


def test_messages_hold_no_password():
    with pytest.raises(click.ClickException) as error, user_errors():
        raise ValueError("https://me:secret@host/net.pkl?token=secret: works on latents")
    assert error.value.message == "https://host/net.pkl: works on latents"


def test_defects_and_messages_of_click_pass():
    for error in (RuntimeError("shapes differ"), KeyError("x"), click.BadParameter("--ts")):
        with pytest.raises(type(error)) as found, user_errors():
            fail(error)()
        assert found.value is error


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_end_in_one_line_and_their_exit_code_after_cleaning_up(number, capsys):
    before, cleaned = signal.getsignal(number), []
    with pytest.raises(SystemExit) as error, user_errors():
        try:
            os.kill(os.getpid(), number)
            signal.sigtimedwait([], 10)
        finally:
            cleaned.append(number)
    assert error.value.code == 128 + number and cleaned == [number]
    assert capsys.readouterr().err == f"Error: stopped by {number.name}\n" and signal.getsignal(number) == before


def test_children_and_ignored_signals_are_left_alone():
    code = """
import os, signal, sys
from torch_utils.errors import user_errors
signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
with user_errors():
    os.kill(os.getpid(), signal.SIGHUP)
    if os.fork() == 0:
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    sys.exit(os.wait()[1])
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (signal.SIGTERM, "")


def test_processes_that_follow_the_main_one_say_nothing_and_let_it_speak(monkeypatch, capsys):
    slept = []
    monkeypatch.setattr(errors.time, "sleep", slept.append)
    with pytest.raises(SystemExit) as error, user_errors():
        raise distributed.MainProcessError("said already")
    assert error.value.code == 1 and capsys.readouterr() == ("", "") and len(slept) == 1


def a_group(monkeypatch, backend, calls):
    """This process in a group; `calls` grows when it leaves."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: backend)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: calls.append(1))


def test_the_process_group_is_left_unless_that_could_wait(monkeypatch):
    calls = []
    for backend, after_errors in (("gloo", 1), ("nccl", 0)):
        a_group(monkeypatch, backend, calls)
        calls.clear()
        with user_errors():
            pass
        assert len(calls) == 1
        with pytest.raises(click.ClickException), user_errors():
            raise ValueError
        assert len(calls) == 1 + after_errors


def test_errors_of_the_system_name_the_file_and_the_reason():
    with pytest.raises(click.ClickException, match="^a/b: No space left on device$"), user_errors():
        raise OSError(28, "No space left on device", "a/b")
    with pytest.raises(click.ClickException, match="^in words$"), user_errors():
        raise OSError("in words")


def test_processes_let_the_main_one_speak_first(monkeypatch):
    slept = []
    monkeypatch.setattr(errors.time, "sleep", slept.append)
    for rank, waits in (("0", []), ("3", [13])):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(click.ClickException, match="a mistake"), user_errors():
            raise ValueError("a mistake")
        assert slept == waits


@pytest.mark.parametrize("grouped", [False, True])
def test_a_lost_process_is_told_unless_another_tells_why(monkeypatch, grouped):
    slept = []
    monkeypatch.setattr(errors.time, "sleep", slept.append)
    if grouped:
        a_group(monkeypatch, "nccl", [])
    with pytest.raises(click.ClickException if grouped else RuntimeError, match="[Cc]onnection"), user_errors():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer [127.0.0.1]:1")
    assert len(slept) == grouped


def test_errors_without_torch_do_not_import_it():
    code = """
import sys
import click
from torch_utils.errors import user_errors
try:
    with user_errors():
        raise ValueError("x")
except click.ClickException:
    sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_values_that_are_too_large_or_too_deep_are_told():
    with pytest.raises(click.ClickException, match="^a number is too large to compute with"), user_errors():
        math.exp(1000)
    with pytest.raises(click.ClickException, match="^something is nested too deeply$"), user_errors():
        raise RecursionError("maximum recursion depth exceeded")

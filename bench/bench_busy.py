"""Images per second of a short generation, alone and beside busy processes, with OpenMP's threads asleep or spinning
while they wait for one another, and as the scripts choose: asleep where others are busy when they start.

python bench/bench_busy.py --out bench/results/cpu_busy.json
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from bench_options import out_option

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

POLICIES = {  # so long OpenMP spins of itself
    "asleep": {"OMP_WAIT_POLICY": "PASSIVE"},
    "spinning": {"GOMP_SPINCOUNT": "300000"},
    "scripts": {},
}
SPIN = "while True: pass"
DRAW = """
import sys, time
from torch_utils.options import set_wait_policy

set_wait_policy()
import torch
import networks
from generation.images import generate_images

num, batch = map(int, sys.argv[1:])
loaded = networks.load("assets/demo/student.safetensors", device="cpu")
loaded.net.to(memory_format=torch.channels_last)
options = dict(ts=(10, 22, 39), batch=batch)
draw = lambda count: [None for _ in generate_images(loaded.net, loaded.encoder, seeds=range(count), **options)]
draw(batch)  # warm-up
started, processor = time.perf_counter(), time.process_time()
draw(num)
print(time.perf_counter() - started, time.process_time() - processor, torch.get_num_threads())
"""


@contextmanager
def busy(count: int) -> Iterator[None]:
    """That many processes beside this one, each of which takes a core."""
    others = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def measure(policy: dict[str, str], num: int, batch: int, threads: int) -> tuple[float, float, int]:
    """Seconds and seconds of processor time for `num` images in a process of its own, and its number of threads."""
    kept = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    variables = kept | policy | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    command = [sys.executable, "-c", DRAW, str(num), str(batch)]
    result = subprocess.run(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True, check=True)
    seconds, processor, used = result.stdout.split()
    return float(seconds), float(processor), int(used)


@click.command(context_settings={"show_default": True})
@click.option("--num", type=click.IntRange(1), default=64, help="Images of the embedded student, two steps.")
@click.option("--batch", type=click.IntRange(1), default=32, help="Images at once.")
@click.option("--busy", "others", type=click.IntRange(1), default=1, help="Busy processes beside it.")
@click.option("--threads", type=click.IntRange(0), default=0, help="Of the generation; 0 = as many as PyTorch takes.")
@click.option("--repeats", type=click.IntRange(1), default=3, help="Measurements of each, in turn; medians are shown.")
@out_option()
def main(num: int, batch: int, others: int, threads: int, repeats: int, out: str | None) -> None:
    """Print images per second of each policy on the machine as it is and beside busy processes, and their ratios."""
    load, used = os.getloadavg()[0], threads
    found: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for _ in range(repeats):  # in turn, so that what else the machine does falls on all alike
        for count in (0, others):
            for name, policy in POLICIES.items():
                with busy(count):
                    seconds, processor, used = measure(policy, num, batch, threads)
                found.setdefault((count, name), []).append((num / seconds, processor / num))
    print(f"{num} images, batch {batch}, {used} threads on {os.cpu_count()} cores, load {load:.1f} at the start")
    print(f"{'busy beside':>11}  {'policy':8}  {'img/s':>8}  {'CPU ms/img':>10}  {'against asleep':>15}")
    rows = []
    for (count, name), values in found.items():
        rate, cost = (statistics.median(column) for column in zip(*values, strict=True))
        passive = statistics.median(value for value, _ in found[count, "asleep"])
        rows.append({"busy": count, "policy": name, "img_per_s": rate, "cpu_s_per_img": cost, "ratio": rate / passive})
        print(f"{count:11}  {name:8}  {rate:8.2f}  {1000 * cost:10.1f}  {rate / passive:15.2f}")
    if out:
        from dnnlib.files import write_json

        facts = {"num": num, "batch": batch, "threads": used, "cores": os.cpu_count(), "load": load, "repeats": repeats}
        write_json(out, {**facts, "rows": rows})


if __name__ == "__main__":
    main()

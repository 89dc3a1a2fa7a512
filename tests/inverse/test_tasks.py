import dataclasses

import click
import pytest

from inverse.operators import get_operator
from inverse.pnp import resolve_likelihood
from inverse.tasks import LangevinSettings, Task, TaskError, load_task, pop_overrides, task_names, task_options

PUBLISHED = {  # beta, ema_sigma, ema_decay
    "box_inpainting": (1e-4, 100, 0.2),
    "random_inpainting": (1e-4, 100, 0.2),
    "gaussian_deblur_circ": (2e-3, 100, 0.6),
    "motion_deblur_circ": (3e-3, 100, 0.6),
    "super_resolution": (1e-3, 100, 0.6),
    "phase_retrieval": (1e-3, 0.2, 0.6),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings(name):
    task = load_task(name)
    assert (task.beta, task.ema_sigma, task.ema_decay) == PUBLISHED[name]
    assert (task.noise, task.steps, task.sigma_min, task.sigma_max, task.rho) == (0.05, 50, 0.002, 80, 2)
    assert (task.langevin.steps, task.langevin.c1, task.langevin.c2) == (100, 0.1, 0.1)
    assert task.runs == (4 if name == "phase_retrieval" else 1)


@pytest.mark.parametrize("name", task_names())
def test_every_task_fits_an_operator_at_its_size(name):
    task = load_task(name)
    size = 16 if name.startswith("demo/") else 256
    operator = get_operator(task.operator["name"], **{k: v for k, v in task.operator.items() if k != "name"})
    assert operator.measurement_shape((1, 1, size, size))
    if hasattr(operator, "mask"):
        operator.mask(size, size)
    assert resolve_likelihood(operator, task.likelihood) in ("exact", "langevin")
    assert task.description and task.name == name.split("/")[-1]


def test_overrides_replace_settings():
    task = load_task("super_resolution", {"beta": 0.5, "runs": 7, "langevin_c1": 0.02, "likelihood": "langevin"})
    assert (task.beta, task.runs, task.likelihood) == (0.5, 7, "langevin")
    assert task.langevin == LangevinSettings(c1=0.02)
    assert task.to_dict()["langevin"]["c1"] == 0.02
    assert dataclasses.replace(task, beta=1e-3).beta == 1e-3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("beta: 1.0", "operator is missing"),
        ("operator: {name: super_resolution}", "beta is missing"),
        ("operator: super_resolution\nbeta: 1.0", "operator must hold a name"),
        ("operator: {name: super_resolution}\nbeta: 0", "beta must be a number from 1e-12 to 1e+12, not 0"),
        ("operator: {name: super_resolution}\nbeta: .nan", "beta must be a number"),
        ("operator: {name: super_resolution}\nbeta: small", "beta must be a number"),
        ("operator: {name: super_resolution}\nbeta: true", "beta must be a number"),
        ("operator: {name: super_resolution}\nbeta: 1.0\nsteps: 2.5", "steps must be a whole number"),
        ("operator: {name: super_resolution}\nbeta: 1.0\nsteps: 1", "from 2 to 10000"),
        ("operator: {name: super_resolution}\nbeta: 1.0\nbetta: 1.0", "no setting 'betta'"),
        ("operator: {name: super_resolution}\nbeta: 1.0\nlangevin: {c3: 1}", "langevin: there is no setting 'c3'"),
        ("operator: {name: super_resolution}\nbeta: 1.0\nlangevin: 5", "langevin must hold settings"),
        ("operator: {name: super_resolution}\nbeta: 1.0\nlangevin: {c1: -1}", "langevin: c1 must be a number from"),
        ("operator: {name: super_resolution}\nbeta: 1.0\nts: 10", "ts must be a list"),
        ("operator: {name: super_resolution}\nbeta: 1.0\nlikelihood: best", "likelihood must be one of auto"),
        ("operator: {name: super_resolution}\nbeta: 1.0\nname: [1]", "name must be text"),
        ("- 1\n- 2", "`setting: value` lines"),
        ("operator: {name: [", "not valid YAML"),
        ("a: &x [1]\nb: *x", "aliases"),
        ("beta: !!python/object/apply:os.system ['touch hacked']", "not valid YAML"),
        ("!!python/name:os.system ''", "not valid YAML"),
        ("[" * 8000 + "]" * 8000, "within each other more than 20 deep"),
        ("".join(f"{' ' * i}a:\n" for i in range(200)), "within each other more than 20 deep"),
        (f"operator: {{name: super_resolution}}\nbeta: {'9' * 400}", "beta: a whole number of 1329 bits is too large"),
        (f"operator: {{name: inpainting, box: [0x{'f' * 9000}]}}\nbeta: 1", "operator: a whole number of 36000 bits"),
        (f"operator: {{name: super_resolution}}\nbeta: '{'9' * 400}'", "beta must be a number from"),
        ("operator: {name: super_resolution}\nbeta: 1\nrho: 1.0e-3", "rho must be a number from 0.1 to 100"),
        ("operator: {name: super_resolution}\nbeta: 1\nsteps: 1000000000", "steps must be a whole number from 2 to"),
        ("operator: {name: super_resolution}\nbeta: 1\nruns: 1000000000000", "runs must be a whole number from 1 to"),
        (
            "operator: {name: super_resolution}\nbeta: 1\nlangevin: {max_retries: 99}",
            "max_retries must be a whole number",
        ),
        ("operator: {name: super_resolution}\nbeta: 1\nnoise: 1.0e+38", "noise must be a number from 0 to 1e+06"),
        ("\x00", "not valid YAML"),
        ("a: " + "x" * 70000, "too large: 70003 bytes"),
    ],
)
def test_bad_tasks_are_refused_in_one_line(text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "task.yaml"
    path.write_text(text)
    with pytest.raises(TaskError, match="task.yaml: ") as caught:
        load_task(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_no_text_and_names_that_do_not_exist(tmp_path):
    (tmp_path / "task.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(TaskError, match="not a text file"):
        load_task(tmp_path / "task.yaml")
    for name in ("nothing", "../task/super_resolution", "demo"):
        with pytest.raises(TaskError, match="there is no task"):
            load_task(name)


def test_every_setting_but_those_of_the_file_is_an_option():
    command = click.Command("command", callback=None)
    command.params = task_options(lambda: None).__click_params__[::-1]
    settings = {f.name for f in dataclasses.fields(Task)} - {"operator", "name", "description", "langevin"}
    assert {param.name for param in command.params} == settings | {"langevin_steps", "langevin_c1", "langevin_c2"}
    with command.make_context("command", ["--steps", "7", "--langevin-c1", "0.5", "--ts", "10,22"]) as context:
        given = pop_overrides(context.params)
    assert given == {"steps": 7, "langevin_c1": 0.5, "ts": (10, 22, 39)} and not context.params


def test_a_task_can_be_made_without_a_file():
    task = Task(operator={"name": "inpainting", "fraction": 0.5}, beta=0.1, ts=(10, 39))
    assert task.to_dict()["operator"] == {"name": "inpainting", "fraction": 0.5}
    with pytest.raises(TaskError, match="runs must be a whole number"):
        Task(operator={"name": "inpainting"}, beta=0.1, runs=0)

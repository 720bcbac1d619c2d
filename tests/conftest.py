"""Fixtures: a tiny Atlas (a few rows, a model of 40,000 parameters), and runs of every script on it, made when asked for.

What a session shares are folders. Arguments, models and configurations are made anew for each test, so that none can
change what another one reads: REVERSE=1 runs all tests in the reverse order.
"""
import importlib
import json
import os
import random
import re
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")             # tiny models: more threads only wait for each other
os.environ["HF_HUB_OFFLINE"] = "1"                        # no test needs the network
os.environ["ACCELERATE_USE_CPU"] = "true"                 # and none a GPU

import torch  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import atlas  # noqa: E402

ROOT = Path(__file__).parent.parent
SCRIPTS = {"sft": "sft.py", "gvm": "train_gvm.py", "dvpo": "train_dvpo.py",
           **{name: f"baselines/{name}.py" for name in ("reward_model", "ppo", "grpo", "remax", "dpo")}}
ONLINE = {"steps": 3, "batch_size": 8, "mini_batch_size": 4, "micro_batch_size": 2, "max_response_length": 12}
SUPERVISED = {"epochs": 1, "batch_size": 16, "micro_batch_size": 8}
SIZES = {"sft": SUPERVISED | {"epochs": 4, "warmup_steps": 5}, "gvm": SUPERVISED, "reward_model": SUPERVISED,
         "dpo": SUPERVISED | {"warmup_steps": 2}, "dvpo": ONLINE, "ppo": ONLINE, "grpo": ONLINE | {"group_size": 4},
         "remax": {name: size for name, size in ONLINE.items() if name != "mini_batch_size"}}


def pytest_collection_modifyitems(items):
    if os.environ.get("REVERSE"):
        items.reverse()


def script(name):
    """The module of "sft", "gvm", "ppo", ... Imported when it is needed."""
    return importlib.import_module(SCRIPTS[name].removesuffix(".py").replace("/", "."))


@pytest.fixture(autouse=True)
def a_fresh_start():
    """No test goes on with another one's random numbers or precision."""
    torch.manual_seed(0)
    random.seed(0)
    yield
    AcceleratorState._reset_state()


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with base/ (one layer, hidden size 32) and data/ (the first rows of each file of Atlas, seed 1)."""
    folder = tmp_path_factory.mktemp("world")
    atlas.write_base_model(folder / "base", seed=1, hidden_size=32, layers=1)
    atlas.write_data(folder / "data", seed=1)
    for file in (folder / "data").glob("*.jsonl"):
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:160]))
    return folder


def make_args(world, runs, name, output, changes):
    fields = script(name).Args.__dataclass_fields__
    inputs = {"model": world / "base" if name == "sft" else "sft", "gvm": "gvm", "reward_model": "reward_model"}
    given = {"data": str(world / "data"), "output": str(output)} | SIZES[name]
    for field, path in inputs.items():
        if field in fields and field not in changes:           # a run that nobody asks for is not made
            given[field] = str(runs(path) if isinstance(path, str) else path)
    return script(name).Args(**given | {key: str(x) if isinstance(x, Path) else x for key, x in changes.items()})


@pytest.fixture(scope="session")
def runs(world):
    """runs("ppo"): the folder of that script's run, to be read only."""
    def get(name):
        if not (world / name / "model.safetensors").exists():
            script(name).main(make_args(world, get, name, world / name, {"overwrite": True}))
        return world / name
    return get


@pytest.fixture
def args(world, runs, tmp_path):
    """args("ppo", field=value, ...): a script's Args, with tiny sizes, that writes to the test's own folder run/."""
    for name in ("sft", "gvm", "reward_model"):                # now, not under what the test is about to patch
        runs(name)
    return lambda name, **changes: make_args(world, runs, name, tmp_path / "run", changes)


@pytest.fixture
def random_batch():
    """Rows [prompt | response | padding] of different lengths: (is_response, draws of that shape in float64)."""
    generator = torch.Generator().manual_seed(0)
    start, end, position = torch.tensor([[2], [3], [1], [4]]), torch.tensor([[7], [4], [9], [9]]), torch.arange(10)
    is_response = (start <= position) & (position < end)
    return is_response, lambda: torch.randn(is_response.shape, generator=generator, dtype=torch.float64)


def responses(is_response):
    """[(row, first token, one past the last token), ...]"""
    return [(b, row.nonzero()[0].item(), row.nonzero()[-1].item() + 1) for b, row in enumerate(is_response)]


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def without_seconds(folder):
    """metrics.jsonl of a run, without what no two runs have alike."""
    return [{name: x for name, x in record.items() if "seconds" not in name} for record in read_lines(folder / "metrics.jsonl")]


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def fails(call, pattern):
    """The call ends with one clear line on stderr and status 1: SystemExit("error: ...")."""
    with pytest.raises(SystemExit) as stopped:
        call()
    message = str(stopped.value)
    assert message.startswith("error: ") and "\n" not in message and re.search(pattern, message), message

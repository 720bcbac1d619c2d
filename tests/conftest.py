"""Fixtures: a tiny Atlas (a few rows, a model of 30,000 parameters), and runs of every stage on it, made once."""
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")             # tiny models: more threads only wait for each other
os.environ["HF_HUB_OFFLINE"] = "1"                        # no test needs the network
os.environ["ACCELERATE_USE_CPU"] = "true"                 # and none a GPU

import torch  # noqa: E402

import atlas  # noqa: E402
import sft  # noqa: E402
from baselines import dpo, grpo, ppo, remax, reward_model  # noqa: E402
import train_dvpo  # noqa: E402
import train_gvm  # noqa: E402

ROOT = Path(__file__).parent.parent


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with base/ (one layer, hidden size 32) and data/ (the first rows of each file of Atlas, seed 1)."""
    folder = tmp_path_factory.mktemp("world")
    atlas.write_base_model(folder / "base", seed=1, hidden_size=32, layers=1)
    atlas.write_data(folder / "data", seed=1)
    for file in (folder / "data").glob("*.jsonl"):
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:160]))
    return folder


@pytest.fixture(scope="session")
def sft_args(world):
    return sft.Args(model=str(world / "base"), data=str(world / "data"), output=str(world / "sft"), epochs=4, warmup_steps=5,
                    log_every=2)


@pytest.fixture(scope="session")
def sft_run(sft_args):
    sft.main(sft_args)
    return Path(sft_args.output)


@pytest.fixture(scope="session")
def gvm_args(world, sft_run):
    return train_gvm.Args(model=str(sft_run), data=str(world / "data"), output=str(world / "gvm"), epochs=1,
                          log_every=2, eval_every=5)


@pytest.fixture(scope="session")
def gvm_run(gvm_args):
    train_gvm.main(gvm_args)
    return Path(gvm_args.output)


@pytest.fixture(scope="session")
def dvpo_args(world, sft_run, gvm_run):
    return train_dvpo.Args(model=str(sft_run), gvm=str(gvm_run), data=str(world / "data"), output=str(world / "dvpo"),
                           steps=3, batch_size=8, mini_batch_size=4, micro_batch_size=2, max_response_length=12,
                           sample_every=2)


@pytest.fixture(scope="session")
def dvpo_run(dvpo_args):
    train_dvpo.main(dvpo_args)
    return Path(dvpo_args.output)


@pytest.fixture(scope="session")
def reward_model_args(world, sft_run):
    return reward_model.Args(model=str(sft_run), data=str(world / "data"), output=str(world / "reward_model"), epochs=1,
                             log_every=2, eval_every=5)


@pytest.fixture(scope="session")
def reward_model_run(reward_model_args):
    reward_model.main(reward_model_args)
    return Path(reward_model_args.output)


@pytest.fixture(scope="session")
def ppo_args(dvpo_args, reward_model_run, world):
    return online(ppo, dvpo_args, reward_model_run, world / "ppo")


@pytest.fixture(scope="session")
def ppo_run(ppo_args):
    ppo.main(ppo_args)
    return Path(ppo_args.output)


@pytest.fixture(scope="session")
def grpo_args(dvpo_args, reward_model_run, world):
    return replace(online(grpo, dvpo_args, reward_model_run, world / "grpo"), group_size=4)


@pytest.fixture(scope="session")
def grpo_run(grpo_args):
    grpo.main(grpo_args)
    return Path(grpo_args.output)


@pytest.fixture(scope="session")
def remax_args(dvpo_args, reward_model_run, world):
    return online(remax, dvpo_args, reward_model_run, world / "remax")


@pytest.fixture(scope="session")
def remax_run(remax_args):
    remax.main(remax_args)
    return Path(remax_args.output)


@pytest.fixture(scope="session")
def dpo_args(world, sft_run):
    return dpo.Args(model=str(sft_run), data=str(world / "data"), output=str(world / "dpo"), batch_size=16, log_every=2,
                    warmup_steps=2)


@pytest.fixture(scope="session")
def dpo_run(dpo_args):
    dpo.main(dpo_args)
    return Path(dpo_args.output)


def online(script, dvpo_args, reward_model_run, output):
    """An online baseline's Args with the sizes of dvpo_args."""
    fields = script.Args.__dataclass_fields__
    shared = {name: value for name, value in vars(dvpo_args).items() if name in fields}
    return script.Args(**shared | {"reward_model": str(reward_model_run), "output": str(output)})


@pytest.fixture
def again(tmp_path):
    """again(args, field=value, ...): a copy of a stage's Args that writes to a fresh folder."""
    return lambda args, **changes: replace(args, **{"output": str(tmp_path / "run")} | changes)


@pytest.fixture
def random_batch():
    """Rows [prompt | response | padding] of different lengths: (is_response, is_value), and float64 draws of a shape."""
    generator = torch.Generator().manual_seed(0)
    start, end, position = torch.tensor([[2], [3], [1], [4]]), torch.tensor([[7], [4], [9], [9]]), torch.arange(10)
    is_response = (start <= position) & (position < end)
    return is_response, lambda: torch.randn(is_response.shape, generator=generator, dtype=torch.float64)


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]

"""A disk that is full, or a folder that cannot be written: one clear line, and the run is resumed from the last checkpoint.

A file that is a link to /dev/full can be opened and made longer, but whatever is written to it fails as on a full disk.
"""
import errno
import resource
import shutil
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import read_lines
from safetensors.torch import load_file
from test_bad_input import fails
from test_resume import SCRIPTS, without_times

import sft

FULL = Path("/dev/full")
pytestmark = pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")


def fill(folder, name):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(FULL)


@contextmanager
def room(size):
    """No file can grow beyond so many bytes. (safetensors writes to a new file, so a link does not stop it.)"""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def make_room(output):
    for file in output.rglob("*"):
        if file.is_symlink():
            file.unlink()


def same(a, b):
    files = [file.relative_to(a) for file in a.rglob("*.safetensors") if "checkpoints" not in file.parts]
    a, b = ({f"{file}/{key}": x for file in files for key, x in load_file(run / file).items()} for run in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, request):
    """whole(name): (script, Args, folder of a run without an accident). Each is made once."""
    made = {}

    def make(name):
        if name not in made:
            script, args = SCRIPTS[name], request.getfixturevalue(f"{name}_args")
            args = replace(args, output=str(tmp_path_factory.mktemp(name) / "run"), save_steps=1,
                           **({"steps": 4} if hasattr(args, "steps") else {"log_every": 1, "epochs": 1}))
            script.main(args)
            made[name] = script, args, Path(args.output)
        return made[name]

    return make


def stopped_and_resumed(whole, name, output, accident, place):
    """The run ends with one line that names the place, what was saved before is whole, and --resume ends as `whole` did."""
    script, args, without = whole(name)
    args = replace(args, output=str(output))
    with pytest.MonkeyPatch.context() as patch:
        accident(script, patch)
        fails(lambda: script.main(args), rf"{place}.*cannot be written.*(No space left on device|File too large|file write failed|unexpected pos).*--resume")
    assert not (output / "model.safetensors").exists()
    make_room(output)
    script.main(replace(args, resume=True))
    assert same(without, output) and without_times(without) == without_times(output)
    if (without / "rollouts.jsonl").exists():
        assert read_lines(without / "rollouts.jsonl") == read_lines(output / "rollouts.jsonl")


def in_checkpoint(name):
    """An accident: there is no room for this file of the third checkpoint."""
    def accident(script, patch):
        save_checkpoint = script.save_checkpoint

        def saving(accelerator, output, step):
            if step == 3 and name != "model.safetensors":
                fill(output / "checkpoints" / ".step_3", name)
            with room(20_000) if step == 3 and name == "model.safetensors" else nullcontext():
                save_checkpoint(accelerator, output, step)

        patch.setattr(script, "save_checkpoint", saving)
    return accident


def in_log(name):
    def accident(script, patch):
        write_lines = script.write_lines

        def writing(path, records):
            if path.name == name and records[0].get("step", records[0].get("update")) == 3:
                kept = path.read_bytes()
                fill(path.parent, name)
                try:
                    write_lines(path, records)
                finally:                                      # half of the line had found room
                    path.unlink()
                    path.write_bytes(kept + b'{"step": 3, "upd')
            else:
                write_lines(path, records)

        patch.setattr(script, "write_lines", writing)
    return accident


def in_the_end(name):
    def accident(script, patch):
        save_run = script.save_run

        def saving(accelerator, model, tokenizer, output, *rest):
            if name != "model.safetensors":
                fill(Path(output) / ".saving", name)
            with room(100_000) if name == "model.safetensors" else nullcontext():
                save_run(accelerator, model, tokenizer, output, *rest)

        patch.setattr(script, "save_run", saving)
    return accident


@pytest.mark.parametrize("name, file", [("sft", "model.safetensors"), ("sft", "optimizer.bin"), ("sft", "random_states_0.pkl"),
                                        ("ppo", "optimizer.bin")])
def test_no_room_for_a_checkpoint(whole, name, file, tmp_path):
    stopped_and_resumed(whole, name, tmp_path / "run", in_checkpoint(file), r"run/checkpoints/\.step_3")


@pytest.mark.parametrize("name, file", [("gvm", "metrics.jsonl"), ("dvpo", "metrics.jsonl"), ("dvpo", "rollouts.jsonl")])
def test_no_room_for_the_log(whole, name, file, tmp_path):
    stopped_and_resumed(whole, name, tmp_path / "run", in_log(file), file)


@pytest.mark.parametrize("name, file", [("sft", "model.safetensors"), ("sft", "config.json"), ("dvpo", "README.md"),
                                        ("ppo", "model.safetensors")])
def test_no_room_for_the_model(whole, name, file, tmp_path):
    stopped_and_resumed(whole, name, tmp_path / "run", in_the_end(file), "run")


@pytest.mark.parametrize("call", ["torch.save", "accelerate.utils.other.safe_save_file", "pathlib.Path.rename"])
def test_any_call_may_fail(whole, call, tmp_path, monkeypatch):
    """The third time it is called, whichever file that is."""
    def accident(script, patch):
        module, _, name = call.rpartition(".")
        owner = pytest.importorskip(module) if module != "pathlib.Path" else Path
        real, calls = getattr(owner, name), []

        def failing(*args, **kwargs):
            calls.append(1)
            if len(calls) == 3:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args, **kwargs)

        patch.setattr(owner, name, failing)

    stopped_and_resumed(whole, "sft", tmp_path / "run", accident, "run")


def test_a_folder_that_cannot_be_written(sft_args, again):
    fails(lambda: sft.main(again(sft_args, output="/proc/run")), "/proc/run cannot be written")
    fails(lambda: sft.main(again(sft_args, output="/dev/null/run")), "/dev/null/run cannot be written")
    fails(lambda: sft.main(again(sft_args, output="/dev/null")), "/dev/null: is a file")


def test_no_room_for_the_settings(sft_args, sft_run, again, tmp_path):
    """What was to be replaced is still there: it is deleted when the new run has begun."""
    shutil.copytree(sft_run, tmp_path / "run")
    write_text = Path.write_text

    def full(path, text, *args, **kwargs):
        if path.name == "args.json.part":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_text(path, text, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        fails(lambda: sft.main(again(sft_args, overwrite=True)), "run cannot be written")
    assert (tmp_path / "run" / "model.safetensors").exists() and not (tmp_path / ".run.replaced").exists()
    sft.main(again(sft_args, overwrite=True))
    assert (tmp_path / "run" / "model.safetensors").exists() and not (tmp_path / ".run.replaced").exists()

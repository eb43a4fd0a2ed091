"""Training: what is resumed is what was never stopped, whatever stopped it; processes and parts change nothing."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from seriatim import compiling
from seriatim.systems.text.next_token import Config, NextToken
from seriatim.training import trainer
from seriatim.training.board import Board
from seriatim.training.recipe import Recipe
from seriatim.training.run import RunFolder, read_lines
from seriatim.training.state import read_safely
from seriatim.training.trainer import train

TEXT = ["".join(chr(97 + (i * i + 3 * i) % 23) for i in range(3000))]

# a training in a process of its own; argument 2: how it dies ("": not at all), argument 3: parts a batch
SCRIPT = """
import os, signal, sys, time, torch
from seriatim.systems.text.next_token import Config, NextToken
from seriatim.training import state, trainer
from seriatim.training.recipe import Recipe
from seriatim.training.run import RunFolder
torch.set_num_threads(1)
folder, death, parts, text = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
trainer.SAVE_EVERY = 0.0  # after every step
if death == "while saving":
    whole, count = state.save_file, 0
    def half(tensors, path, about):
        global count
        count += 1
        whole(tensors, path, about)
        if count == 9:  # the file is there, but half of it
            with open(path, "r+b") as file:
                file.truncate(os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
    state.save_file = half
torch.manual_seed(0)
system = NextToken(Config(length=16, width=32, depth=1, heads=2))
def tick(step, steps, figures):
    print(step, flush=True)
    if death and death != "while saving":
        time.sleep(0.02)
trainer.train(
    system, system.examples([text]), Recipe(50, batch=4, accumulate=parts, ema=0.9), RunFolder(folder), {"a": 1},
    resume=os.path.exists(os.path.join(folder, "run.json")), tick=tick)
"""


def start(folder: Path, death: str = "", parts: int = 1, launcher: tuple[str, ...] = (), **environment: str):
    script = folder.parent / "script.py"
    script.write_text(SCRIPT)
    source = str(Path(trainer.__file__).parents[2])
    return subprocess.Popen(
        [sys.executable, *launcher, str(script), str(folder), death, str(parts), TEXT[0]],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
    )  # fmt: skip


def finished(process: subprocess.Popen) -> None:
    out, err = process.communicate(timeout=110)
    assert process.returncode == 0, err[-2000:]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    finished(start(folder))
    return folder


def same_run(folder: Path, whole: Path) -> None:
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    steps, expected = read_lines(folder / "metrics.jsonl"), read_lines(whole / "metrics.jsonl")
    assert [s["step"] for s in steps] == list(range(1, 51))
    assert [s["loss"] for s in steps] == [s["loss"] for s in expected]


@pytest.mark.slow
def test_a_run_that_is_killed_five_times_ends_as_if_it_had_not_been(tmp_path, uninterrupted):
    """kill -9 at four random moments, and once with a half-written state on the disk."""
    folder, moments = tmp_path / "run", random.Random(7)
    for n in range(5):
        process = start(folder, "while saving" if n == 2 else "between")
        if n != 2:
            stop_at = moments.randint(1, 7)
            for _ in range(stop_at):
                if not process.stdout.readline():
                    break
            time.sleep(moments.random() * 0.05)
            process.send_signal(signal.SIGKILL)
        process.communicate(timeout=110)
        assert process.returncode == -signal.SIGKILL
    finished(start(folder))
    same_run(folder, uninterrupted)


@pytest.mark.slow
def test_ctrl_c_ends_the_step_saves_and_can_be_resumed(tmp_path, uninterrupted):
    folder = tmp_path / "run"
    process = start(folder, "between")
    for _ in range(5):
        process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=110)
    assert process.returncode != 0 and "KeyboardInterrupt" in err
    assert len(read_lines(folder / "metrics.jsonl")) >= 5
    finished(start(folder))
    same_run(folder, uninterrupted)


TORCHRUN = (
    "-m",
    "torch.distributed.run",
    "--nproc_per_node",
    "2",
    "--rdzv-backend",
    "c10d",
    "--rdzv-endpoint",
    "localhost:0",
)


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["copies", "shards"])
def test_two_processes_train_what_one_does(tmp_path, uninterrupted, sharded):
    """Whole copies (DDP) and shards (FSDP2): the losses of each step, and the weights at the end."""
    folder = tmp_path / "run"
    environment = {"ACCELERATE_USE_FSDP": "true"} if sharded else {}
    finished(start(folder, launcher=TORCHRUN, **environment))
    ours, theirs = (read_lines(f / "metrics.jsonl") for f in (folder, uninterrupted))
    assert len(ours) == 50 and max(abs(a["loss"] - b["loss"]) for a, b in zip(ours, theirs, strict=True)) < 1e-4
    a, b = (load_file(f / "model.safetensors") for f in (folder, uninterrupted))
    assert a.keys() == b.keys() and max(float((a[k] - b[k]).abs().max()) for k in a) < 1e-4


# ---- in this process -------------------------------------------------------------------------------------------------


def run(folder: Path, steps: int = 6, resume: bool = False, **changes):
    torch.manual_seed(0)
    system = NextToken(Config(length=16, width=32, depth=1, heads=2))
    examples = system.examples(TEXT)
    history = train(
        system, examples, Recipe(steps, **{"batch": 4, **changes}), RunFolder(folder), {"recipe": changes},
        held_out=examples, resume=resume,
    )  # fmt: skip
    return system, history


def test_parts_of_a_batch_change_nothing_but_rounding(tmp_path):
    whole, one = run(tmp_path / "a")
    parts, four = run(tmp_path / "b", accumulate=4)
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(one, four, strict=True)) < 1e-5
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(whole.parameters(), parts.parameters(), strict=True))


def test_a_batch_that_parts_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="a batch of 6 cannot be computed in 4 equal parts"):
        Recipe(1, batch=6, accumulate=4)


def test_averaged_weights_are_what_generation_loads(tmp_path):
    """The file holds the running mean by the recipe's decay, computed here by hand from the weights of every step."""
    folder, recipe = tmp_path / "a", Recipe(6, batch=4, ema=0.8)
    torch.manual_seed(0)
    system = NextToken(Config(length=16, width=32, depth=1, heads=2))
    mean = {k: v.detach().clone() for k, v in system.model.named_parameters()}

    def follow(step, steps, figures):
        for k, v in system.model.named_parameters():
            mean[k] += (1 - recipe.decay(step - 1)) * (v.detach() - mean[k])

    train(system, system.examples(TEXT), recipe, RunFolder(folder), {}, tick=follow)
    stored = load_file(folder / "model.safetensors")
    assert all(torch.allclose(stored[k], mean[k], atol=1e-6) for k in mean)
    assert all(torch.equal(v, stored[k]) for k, v in system.model.state_dict().items())
    last = load_file(folder / "state.safetensors")
    assert max(float((mean[k] - last[f"model.model.{k}"]).abs().max()) for k in mean) > 1e-4


def test_a_loss_that_breaks_down_stops_and_keeps_the_last_good_state(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(NextToken, "losses", _nan_after(NextToken.losses, 3))
    with pytest.raises(FloatingPointError, match=r"step 4.*lower the learning rate.*kept"):
        run(tmp_path / "a")
    monkeypatch.undo()
    _, history = run(tmp_path / "a", resume=True)
    assert [h["step"] for h in history] == list(range(1, 7))


def _nan_after(losses, good: int):
    calls = [0]

    def broken(self, *args):
        calls[0] += self.training
        total, count = losses(self, *args)
        return (total * float("nan") if self.training and calls[0] > good else total), count

    return broken


def test_a_full_disk_keeps_the_old_state(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "SAVE_EVERY", 0.0)
    calls = [0]
    from seriatim.training import state

    save = state.save_file

    def full(tensors, path, about):
        calls[0] += 1
        if calls[0] > 4:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(tensors, path, about)

    monkeypatch.setattr(state, "save_file", full)
    with pytest.raises(OSError, match=r"No space left.*kept.*--resume"):
        run(tmp_path / "a")
    assert not list((tmp_path / "a").glob("*.part"))
    monkeypatch.undo()
    _, history = run(tmp_path / "a", resume=True)
    assert [h["step"] for h in history] == list(range(1, 7))


def test_two_trainings_do_not_share_a_folder(tmp_path):
    with RunFolder(tmp_path / "a").held(), pytest.raises(ValueError, match="another training writes"):
        run(tmp_path / "a")


def test_a_finished_folder_is_not_written_over(tmp_path):
    run(tmp_path / "a")
    with pytest.raises(ValueError, match=r"holds a training already.*--resume"):
        run(tmp_path / "a")


def test_resuming_with_other_settings_is_refused_and_named(tmp_path):
    run(tmp_path / "a")
    with pytest.raises(ValueError, match=r"other settings \(recipe.batch 32, now 8\)"):
        run(tmp_path / "a", resume=True, batch=8)


def test_a_state_that_is_cut_short_is_refused(tmp_path):
    run(tmp_path / "a")
    state = tmp_path / "a" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cut short"):
        run(tmp_path / "a", resume=True)


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="nothing can be written"):
        run(tmp_path / "file" / "a")


def test_a_budget_of_time_fixes_the_steps_before_the_first(tmp_path):
    """A minute's worth of steps; weights start from the same point as without a budget."""
    torch.manual_seed(0)
    system = NextToken(Config(length=16, width=32, depth=1, heads=2))
    history = train(system, system.examples(TEXT), Recipe(10**6, batch=4), RunFolder(tmp_path / "a"), {}, minutes=0.01)
    assert trainer.CALIBRATION <= len(history) < 10**4
    _, plain = run(tmp_path / "b", steps=len(history))
    assert history[0]["loss"] == plain[0]["loss"]
    about = read_safely(tmp_path / "a" / "state.safetensors")[1]
    assert about == {"step": len(history), "steps": len(history)}


def test_a_machine_that_is_held_up_once_is_not_taken_for_a_slow_one(tmp_path, monkeypatch):
    """A step that waits for half of the budget leaves the count as it would be without."""
    system = NextToken(Config(length=16, width=32, depth=1, heads=2))
    clock, taken = iter(range(10**6)), []

    def now() -> float:  # a second later each time it is asked, and in the third step 30 more
        taken.append(next(clock))
        return taken[-1] + (30.0 if len(taken) > 5 else 0.0)

    recipe = Recipe(10**6, batch=4)
    training = trainer._Training(system, system.examples(TEXT), recipe, RunFolder(tmp_path), None, None)
    monkeypatch.setattr(trainer.time, "monotonic", now)
    assert training._steps_in(60.0) == 60


# ---- compiling, and what is told -------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [True, False], ids=["compiler", "no compiler"])
def test_layers_are_compiled_where_there_is_a_compiler_and_else_it_is_said_once(monkeypatch, there):
    """The parts themselves are asked, and not compiled here: that takes a minute."""
    asked = []
    monkeypatch.setattr(compiling.shutil, "which", lambda name: "/usr/bin/it" if there else None)
    monkeypatch.setattr(compiling.Path, "is_file", lambda self: True)
    system = NextToken(Config(length=16, width=32, depth=1, heads=2))
    for part in (p for p in system.modules() if hasattr(p, "compile_training")):
        monkeypatch.setattr(part, "compile_training", lambda part=part: asked.append(part))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.compile_layers(system)
    assert len(asked) == (2 if there else 0) and len(said) == (0 if there else 1)
    assert there or "no C++ compiler" in str(said[0].message)


def test_figures_of_a_batch_stand_in_the_log_beside_its_loss(tmp_path):
    """What a tokenizer says of its codes while it is trained."""
    from seriatim.verbs.train import train as train_by_key

    settings = {"steps": 6, "batch": 8, "warm_up": 0.3, "width": 8, "vocab": 8}
    trained = train_by_key("image-vq", "digits", out=tmp_path / "vq", settings=settings)
    last = read_lines(tmp_path / "vq" / "metrics.jsonl")[-1]
    assert {"psnr", "codes_used", "perplexity", "codes_revived"} < last.keys() and 1 <= last["codes_used"] <= 8
    assert trained.history[-1]["psnr"] == last["psnr"]


def test_a_board_has_every_step_once_after_a_resumed_training(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for steps in ((1, 2, 3), (3, 4)):  # the third is taken again
        board = Board(tmp_path)
        for step in steps:
            board(step, 4, {"loss": float(10 * step)})
        board.close()
    events = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {e.step: e.value for e in events.Scalars("loss")} == {1: 10, 2: 20, 3: 30, 4: 40}
    assert len(events.Scalars("loss")) == 4

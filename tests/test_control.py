"""Decisions of several processes: a group of one real process answers a step late, as larger ones do."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from test_train_state import checkpoints_of, make_state, resumed, save_best, saved

import checkpoints
import utils
from control import Agreement


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    utils._control.append(dist.new_group(backend="gloo"))
    yield
    utils.close_distributed()


def test_an_evaluation_is_not_cut_short_by_what_training_wished(group: None) -> None:
    """The answer to the last step's poll comes in the evaluation; with no images there is no accuracy."""
    agreement = Agreement()
    agreement.poll(save=True, fail=True)
    assert list(agreement.until_stopped([1, 2, 3])) == [1, 2, 3]


def test_a_failure_in_an_evaluation_still_ends_it(group: None) -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise ValueError("an image")

    class Batches:
        __len__ = [1, 2, 3, 4].__len__
        __iter__ = staticmethod(broken)

    batches = Agreement().until_stopped(Batches())
    assert next(batches) == 1
    with pytest.raises(ValueError, match="an image"):
        next(batches)


def test_one_wish_makes_one_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: None) -> None:
    """The main process still wishes at the step of the save; the answer to that comes after it."""
    now = [0.0]
    monkeypatch.setattr(checkpoints, "time", SimpleNamespace(monotonic=lambda: now[0]))
    state = make_state(opts=("SAVE_MINUTES", 1))
    saving = checkpoints_of(tmp_path, state)
    for step in range(1, 9):
        now[0] = 50 + 10 * step
        state.position.step = step
        state.position.deal(1, 8)
        saving.after_update(state, is_last=False)
    saving.finish()
    assert {path.name for path in tmp_path.iterdir()} == {"ckpt_epoch_0_step_2.pth"}
    for step in range(9, 12):
        now[0] = 50 + 10 * step
        state.position.step = step
        state.position.deal(1, 8)
        saving.after_update(state, is_last=False)
    saving.finish()
    assert (tmp_path / "ckpt_epoch_0_step_10.pth").exists()


def test_a_stop_tries_a_failed_save_again(tmp_path: Path) -> None:
    """The disk was full for a moment; nothing was done since, but what was done is not on the disk."""
    folder = tmp_path / "run"
    folder.write_text("in the way")
    state = make_state()
    saving = checkpoints_of(folder, state)
    state.position.epoch = 1
    saving.after_epoch(state)
    saving.saver.wait()
    assert saving.saver.last_error
    folder.unlink()
    saving.stop(state)
    assert (folder / "ckpt_epoch_0.pth").exists()


def test_all_processes_take_the_same_for_the_best(tmp_path: Path, group: None) -> None:
    state = make_state()
    state.max_accuracy, state.run = 100 / 3, 1
    save_best(tmp_path, state)
    state.max_accuracy = 10.0
    saved(tmp_path, state, epoch=3)
    assert resumed(tmp_path).max_accuracy == 100 / 3  # to the last digit

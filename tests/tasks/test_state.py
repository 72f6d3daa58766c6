"""The state of a run: written whole, found whole, and kept from other runs."""

import errno
import os
import pickle
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from test_training import StopAfter

from localmamba._files import DRAFTS
from localmamba._signals import Stopped
from localmamba.tasks.run_folder import finish, is_finished, make_run_folder, open_run_folder
from localmamba.tasks.state import BEFORE, STATE, StateIO, find_state, read_state
from localmamba.tasks.training import Training


@pytest.fixture
def stopped(job, tmp_path) -> Path:
    """The folder of a training that was stopped in its fifth step, with two states."""
    with pytest.raises(Stopped):
        Training(job(save_steps=2)).run(tmp_path, callbacks=(StopAfter(5),))
    return tmp_path


def steps(folder: Path) -> list[int]:
    return [read_state(folder / name)["global_step"] for name in (STATE, BEFORE)]


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_two_states_are_kept(stopped):
    assert steps(stopped) == [5, 3]
    assert not list(stopped.glob(DRAFTS))


def test_the_one_before_serves_where_the_newest_is_damaged(stopped, job):
    damage(stopped / STATE)
    message = "state.pt is damaged, .*; resuming from the one before, .*state-before.pt"
    with pytest.warns(UserWarning, match=message), pytest.raises(Stopped):
        Training(job()).run(stopped, resume=True, callbacks=(StopAfter(4),))
    # The next state to be saved does not push the good one out.
    assert read_state(stopped / STATE)["global_step"] == 3
    assert not (stopped / BEFORE).exists()


def test_a_kill_between_the_two_renames_loses_nothing(stopped, job):
    (stopped / STATE).unlink()
    assert find_state(stopped, job()) == stopped / BEFORE


def test_nothing_whole_is_one_line(stopped, job):
    for cut in (1, 40, 10**4):
        for name in (STATE, BEFORE):
            (stopped / name).write_bytes((stopped / name).read_bytes()[:-cut])
        with pytest.raises(
            ValueError, match=r"nothing to resume: .*state.pt is damaged.*and"
        ) as no:
            find_state(stopped, job())
        assert "\n" not in str(no.value)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("content", [[1], {"job": 3}, {"state_dict": 1.0}, Bomb()])
@pytest.mark.parametrize("whole", [True, False], ids=["checksum", "none"])
def test_what_is_no_state_is_refused(content, whole, job, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / STATE
    if whole:
        StateIO().save_checkpoint(content, path)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match="no state of a run"):
        find_state(tmp_path, job())
    data = pickle.dumps(content, 2)
    path.write_bytes(data + sha256(data).digest())
    with pytest.raises(ValueError, match="no state of a run"):
        find_state(tmp_path, job())
    assert not Path("exploded").exists()


def test_a_state_of_another_job_is_refused(stopped, job):
    with pytest.raises(ValueError, match=r"with other settings: lr was 0.001, now 1"):
        find_state(stopped, job(lr=1.0))
    assert find_state(stopped, job(threads=1, save_steps=9)) == stopped / STATE


def test_a_run_without_a_state_starts_again(job, tmp_path):
    assert find_state(tmp_path, job()) is None
    assert Training(job(epochs=1)).run(tmp_path, resume=True) is not None


def test_a_full_disk_leaves_the_old_state_and_says_so(stopped, job, monkeypatch):
    before = {path: path.read_bytes() for path in stopped.glob("state*")}

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(
        OSError, match=r"no space left on the disk of .* to write .*; what was saved"
    ):
        Training(job()).run(stopped, resume=True)
    assert not list(stopped.glob(DRAFTS))
    assert all(path.read_bytes() == content for path, content in before.items())


def test_a_second_run_in_a_folder_is_refused(tmp_path):
    code = (
        "import sys; from pathlib import Path; from localmamba.tasks.run_folder import *\n"
        "with open_run_folder(Path(sys.argv[1]), 'x', overwrite=True): pass"
    )
    words = [sys.executable, "-c", code, str(tmp_path)]
    with open_run_folder(tmp_path, "x", overwrite=True):
        said = subprocess.run(words, capture_output=True, text=True, check=False)
    assert f"ValueError: another run is under way in {tmp_path}" in said.stderr
    subprocess.run(words, check=True)


def test_what_an_older_run_has_left(tmp_path):
    old = [tmp_path / name for name in (STATE, BEFORE, "metrics.json", ".state.pt.0.draft")]
    for resume, kept in ((True, old[:3]), (False, [])):
        for path in old:
            path.touch()
        with open_run_folder(tmp_path, "x", overwrite=True, resume=resume) as folder:
            assert [path for path in old if path.exists()] == kept
    assert not is_finished(folder)
    finish(folder, {})
    assert is_finished(folder)


def test_run_folders_are_numbered_and_never_shared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = [make_run_folder(None, "a/b") for _ in range(3)]
    assert [path.name for path in made] == ["a-b", "a-b-2", "a-b-3"]


def test_an_output_folder_with_files_is_not_touched(tmp_path):
    assert make_run_folder(tmp_path / "new" / "run", "x").is_dir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="holds files already; name another or pass --overwrite"):
        make_run_folder(tmp_path, "x")
    assert make_run_folder(tmp_path, "x", overwrite=True) == tmp_path
    with pytest.raises(ValueError, match="is a file; name a folder"):
        make_run_folder(tmp_path / "file", "x")

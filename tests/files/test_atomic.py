"""The law of saving: wherever a save stops, the folder loads as exactly the old state or exactly the new one.

Every call that changes the file system is made to fail in turn: the first in one save, the second in the next, …
"""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import json
import os
import shutil

import pytest
import torch
from safetensors import SafetensorError

from loramix.config.base import PeftConfig
from loramix.errors import CheckpointNotFoundError, CorruptCheckpointError, SaveError
from loramix.files import journal, tensors
from loramix.files.json_file import read_json_object, write_json
from loramix.formats import detect, load_adapter, load_mixture, save_adapter, save_mixture
from support.checkpoints import contents, make_expert, make_mixture, same_expert, same_tensors

CALLS = [(os, "replace"), (os, "unlink"), (os, "mkdir"), (os, "rmdir"), (os, "fsync"), (os, "open"), (io, "open")]
FOREIGN = {"notes.txt": b"mine", "math/notes.txt": b"mine too", "code/adapter_model.bin": b"and this"}
STATE = {"weight": torch.arange(3.0)}


class Killed(BaseException):
    """The process is gone: nothing it would have done afterwards happens."""


class Faults:
    """Makes the n-th call fail; with `fatal`, all later ones too, so that no clean-up runs either."""

    def __init__(self, monkeypatch, at, error, *, fatal=False):
        self.count, self.at, self.error, self.fatal, self.failed = 0, at, error, fatal, ""
        for owner, name in CALLS:
            monkeypatch.setattr(owner, name, self.wrap(name, getattr(owner, name)))
        monkeypatch.setattr(tensors, "save_file", self.wrap("save_file", tensors.save_file))

    def wrap(self, name, real):
        def call(*args, **kwargs):
            if name == "open" and "r" in (args[1:] or ("r",))[0:1] and not isinstance(args[0], int):
                return real(*args, **kwargs)
            self.count += 1
            if self.count == self.at or (self.fatal and self.count > self.at):
                self.failed = name
                if name == "save_file" and self.count == self.at:
                    real(*args, **kwargs)
                    with contextlib.suppress(OSError):
                        os.truncate(args[1], 20)
                    raise SafetensorError("injected") if isinstance(self.error, OSError) else self.error
                raise self.error
            return real(*args, **kwargs)

        return call


def run(save, error, *, fatal=False):
    """Save with the n-th call failing, for n = 1, 2, … until a save comes through; yield after each."""
    for at in itertools.count(1):
        outcome: BaseException | None = None
        with pytest.MonkeyPatch.context() as monkeypatch:
            faults = Faults(monkeypatch, at, error, fatal=fatal)
            try:
                save()
            except BaseException as caught:
                outcome = caught
        yield at, faults, outcome
        if not faults.failed:
            assert outcome is None
            return


def state_of(folder, *mixtures):
    """Which of the mixtures a folder holds, bit by bit; anything else fails the test."""
    loaded = load_mixture(folder)
    found = [
        i
        for i, (config, classifier, experts) in enumerate(mixtures)
        if loaded.config == config
        and same_tensors(loaded.router, classifier)
        and all(same_expert(one, two) for one, two in zip(loaded.experts, experts, strict=True))
    ]
    assert len(found) == 1, "neither the one state nor the other"
    return found[0]


def clear(folder):
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def put(folder, mixture, **kwargs):
    """Save into an empty folder, and put foreign files beside."""
    save_mixture(folder, *mixture, **kwargs)
    for name, data in FOREIGN.items():
        (folder / name).write_bytes(data)


def restore(folder, template):
    clear(folder)
    shutil.copytree(template, folder, dirs_exist_ok=True)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)


@pytest.fixture(scope="module")
def old_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("old")
    put(folder, OLD, trainer_state=STATE)
    return folder


@pytest.fixture(scope="module")
def interrupted_folder(tmp_path_factory, old_folder):
    """A save of NEW over OLD that was stopped right after its commit, with every temporary still in its place."""
    folder = tmp_path_factory.mktemp("interrupted")
    restore(folder, old_folder)
    for _at, _faults, _outcome in run(lambda: save_mixture(folder, *NEW), Killed(), fatal=True):
        if (folder / journal.JOURNAL_NAME).exists():
            return folder
    raise AssertionError("no save was stopped after its commit")


def leftovers(folder):
    return [path.name for path in folder.rglob(".loramix-*")]


OLD = make_mixture(seed=100)
NEW = make_mixture(seed=200, xlora_depth=2, xlora_size=4)
ERRORS = {
    "disk full": (OSError(errno.ENOSPC, "injected"), False),
    "interrupt": (KeyboardInterrupt("injected"), False),
    "killed": (Killed("injected"), True),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_overwriting_a_mixture(tmp_path, old_folder, kind):
    error, fatal = ERRORS[kind]
    restore(tmp_path, old_folder)
    states = set()
    for _at, faults, outcome in run(lambda: save_mixture(tmp_path, *NEW), error, fatal=fatal):
        old = state_of(tmp_path, OLD, NEW) == 0
        states.add("old" if old else "new")
        assert contents(tmp_path).items() >= FOREIGN.items()
        if kind == "disk full" and outcome is not None:
            assert isinstance(outcome, SaveError)
            assert isinstance(outcome.__cause__, OSError)
            assert ("the earlier state is in place" in outcome.received) == old
            assert str(tmp_path) in outcome.received
        if kind != "killed" and old and faults.failed != "unlink":
            assert leftovers(tmp_path) == []
        if old:
            assert (tmp_path / "model.safetensors").exists()
        save_mixture(tmp_path, *NEW)
        assert state_of(tmp_path, OLD, NEW) == 1
        assert not (tmp_path / "model.safetensors").exists()
        assert not (tmp_path / journal.JOURNAL_NAME).exists()
        restore(tmp_path, old_folder)
    assert states == {"old", "new"}
    assert faults.count > 20


@pytest.mark.parametrize("kind", ERRORS)
def test_a_first_save(tmp_path, kind):
    error, fatal = ERRORS[kind]
    folder = tmp_path / "a" / "b"
    for _at, faults, _outcome in run(lambda: save_mixture(folder, *NEW), error, fatal=fatal):
        try:
            state_of(folder, NEW)
        except CheckpointNotFoundError:
            assert faults.failed
            if kind != "killed" and faults.failed not in ("unlink", "rmdir"):
                assert not (tmp_path / "a").exists()
        clear(tmp_path)


def test_an_expert_of_its_own(tmp_path):
    old, new = make_expert("x", seed=1), make_expert("x", seed=2, r=3)
    save_adapter(tmp_path, old)
    for at, _faults, _outcome in run(lambda: save_adapter(tmp_path, new), Killed(), fatal=True):
        loaded = load_adapter("x", tmp_path)
        assert same_expert(loaded, old) != same_expert(loaded, new), f"after call {at}"
        save_adapter(tmp_path, old)


def test_one_text_file(tmp_path):
    path = tmp_path / "settings.json"
    write_json(path, {"state": "old"})
    states = set()
    for at, _faults, _outcome in run(lambda: write_json(path, {"state": "new"}), Killed(), fatal=True):
        states.add(read_json_object(journal.current(path))["state"])
        write_json(path, {"state": "old"})
        assert list(contents(tmp_path)) == ["settings.json"], f"after call {at}"
    assert states == {"old", "new"}
    assert path.read_text() == '{\n  "state": "old"\n}\n'


class TestAnInterruptedSave:
    @pytest.fixture
    def folder(self, tmp_path, interrupted_folder):
        restore(tmp_path, interrupted_folder)
        return tmp_path

    def test_reading_writes_nothing(self, folder):
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        assert state_of(folder, OLD, NEW) == 1
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
        assert leftovers(folder)

    def test_every_reader_sees_the_new_state(self, folder):
        assert detect(folder) == "mixture"
        config = PeftConfig.from_pretrained(folder)
        assert config == NEW[0]
        assert same_expert(load_adapter("math", folder / "math"), NEW[2][0])

    def test_a_configuration_saved_alone_is_the_one_in_force(self, folder):
        config = PeftConfig.from_pretrained(folder)
        config.global_scaling_weight = 0.5
        config.save_pretrained(folder)
        assert PeftConfig.from_pretrained(folder) == config
        assert not (folder / journal.JOURNAL_NAME).exists()

    def test_a_later_save_that_is_stopped_too(self, folder, interrupted_folder):
        third = make_mixture(seed=300)
        for _at, _faults, _outcome in run(lambda: save_mixture(folder, *third), Killed(), fatal=True):
            state_of(folder, NEW, third)
            restore(folder, interrupted_folder)

    def test_saving_one_of_its_experts_alone(self, folder):
        expert = make_expert("math", seed=400)
        save_adapter(folder / "math", expert)
        assert same_expert(load_adapter("math", folder / "math"), expert)
        assert same_expert(load_mixture(folder).experts[1], NEW[2][1])

    @pytest.mark.parametrize(
        "content",
        [
            "{",
            "[]",
            "{}",
            json.dumps({"files": {"../x": "../.loramix-x"}, "removed": []}),
            json.dumps({"files": {"/x": "/.loramix-x"}, "removed": []}),
            json.dumps({"files": {"x": "notes.txt"}, "removed": []}),
            json.dumps({"files": {"x": "math/.loramix-x"}, "removed": []}),
            json.dumps({"files": {}, "removed": ["../notes.txt"]}),
        ],
    )
    def test_a_journal_that_is_not_ours_moves_nothing(self, folder, content):
        (folder / journal.JOURNAL_NAME).write_text(content)
        before = contents(folder)
        with pytest.raises(CorruptCheckpointError) as caught:
            load_mixture(folder)
        assert journal.JOURNAL_NAME in caught.value.received
        assert "Delete" in caught.value.remedy
        with pytest.raises(SaveError, match=journal.JOURNAL_NAME):
            save_mixture(folder, *OLD)
        assert contents(folder) == before


def test_a_journal_without_temporaries_says_nothing(tmp_path):
    """Deleting the journal is the last step, and may fail: what others write afterwards is theirs."""
    put(tmp_path, OLD)
    files = {"adapter_config.json": ".loramix-0-adapter_config.json"}
    (tmp_path / journal.JOURNAL_NAME).write_text(journal.Journal(files, ["model.safetensors"]).to_json())
    (tmp_path / "model.safetensors").write_bytes(b"a trainer's")
    assert state_of(tmp_path, OLD, NEW) == 0
    save_mixture(tmp_path, *NEW)
    assert state_of(tmp_path, OLD, NEW) == 1
    assert (tmp_path / "model.safetensors").read_bytes() == b"a trainer's"


def test_what_a_killed_save_left_is_removed_by_the_next(tmp_path, old_folder):
    for _at, _faults, _outcome in run(lambda: save_mixture(tmp_path, *NEW), Killed(), fatal=True):
        if leftovers(tmp_path):
            break
    assert leftovers(tmp_path)
    assert not (tmp_path / journal.JOURNAL_NAME).exists()
    foreign = tmp_path / ".loramix-notes"
    foreign.touch()
    save_mixture(tmp_path, *NEW)
    assert leftovers(tmp_path) == [foreign.name]
    assert state_of(tmp_path, OLD, NEW) == 1

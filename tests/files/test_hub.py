"""Finding files: local folders first, then the Hub's cache, offline; the Hub itself is a fake at the seam."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from loramix.config.base import PeftConfig
from loramix.config.lora import LoraConfig
from loramix.errors import CheckpointNotFoundError, ConfigurationError
from loramix.files.hub import HubOptions, find_any, find_file, is_local, names_in

OLD, NEW = "a" * 40, "b" * 40
NAME = "adapter_config.json"


@pytest.fixture
def cache(tmp_path):
    """huggingface_hub's layout for user/repo: main is NEW, the tag v1 is OLD, a subfolder holds another expert."""
    repo = tmp_path / "hub" / "models--user--repo"
    for commit, rank in ((OLD, 1), (NEW, 2)):
        for folder, extra in (("", 0), ("math", 10)):
            blob = repo / "blobs" / f"{commit[0]}{extra}"
            blob.parent.mkdir(parents=True, exist_ok=True)
            blob.write_text(LoraConfig(r=rank + extra).to_json())
            place = repo / "snapshots" / commit / folder / NAME
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(os.path.relpath(blob, place.parent))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(NEW)
    (repo / "refs" / "v1").write_text(OLD)
    return tmp_path / "hub"


@pytest.fixture
def no_network(monkeypatch):
    """Any request is a failure of the test."""

    def refuse(*_args, **_kwargs):
        raise AssertionError("a request left the machine")

    monkeypatch.setattr("socket.socket.connect", refuse)


@pytest.fixture
def offline(cache, no_network):
    return HubOptions(cache_dir=cache, local_files_only=True)


def rank_at(identifier, options):
    path = find_file(identifier, NAME, options)
    assert path is not None
    return LoraConfig.from_json_file(path).r


class TestLocal:
    def test_a_folder_is_found_and_its_missing_file_is_none(self, tmp_path):
        LoraConfig().save_pretrained(tmp_path)
        assert find_file(tmp_path, NAME) == tmp_path / NAME
        assert find_file(str(tmp_path), "other.json") is None

    def test_a_subfolder(self, tmp_path):
        LoraConfig().save_pretrained(tmp_path / "a" / "b")
        assert find_file(tmp_path, NAME, HubOptions(subfolder="a/b")) == tmp_path / "a" / "b" / NAME

    def test_the_first_of_several(self, tmp_path):
        (tmp_path / "two").touch()
        (tmp_path / "three").touch()
        assert find_any(tmp_path, ("one", "two", "three")) == tmp_path / "two"

    def test_a_folder_goes_before_a_repository_of_that_name(self, tmp_path, monkeypatch, offline):
        LoraConfig(r=7).save_pretrained(tmp_path / "user" / "repo")
        monkeypatch.chdir(tmp_path)
        assert rank_at("user/repo", offline) == 7

    def test_a_home_folder(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        LoraConfig(r=6).save_pretrained(tmp_path / "expert")
        assert rank_at("~/expert", HubOptions()) == 6

    def test_a_missing_subfolder_is_named(self, tmp_path):
        with pytest.raises(CheckpointNotFoundError) as caught:
            find_file(tmp_path, NAME, HubOptions(subfolder="nowhere"))
        assert "'nowhere'" in caught.value.received
        assert str(tmp_path) in caught.value.received
        assert "subfolder=" in caught.value.remedy

    @pytest.mark.parametrize(
        "missing",
        [
            "/no/such/folder",
            "./none",
            "../none",
            "~/no-such-folder",
            "~no-such-user",
            "x" * 5000,
            "a/b/c",
            "a\\b",
            "alone",
            "a\0b",
            ".",
        ],
    )
    def test_a_missing_path_that_looks_local_is_called_missing(self, tmp_path, monkeypatch, no_network, missing):
        if missing == ".":
            missing = "./gone"
        monkeypatch.chdir(tmp_path)
        with pytest.raises(CheckpointNotFoundError) as caught:
            find_file(missing, NAME)
        assert repr(missing) in caught.value.received
        assert "existing folder" in caught.value.rule
        assert "Correct the path" in caught.value.remedy

    @pytest.mark.parametrize("empty", ["", " "])
    def test_an_empty_identifier_is_called_empty(self, no_network, empty):
        with pytest.raises(CheckpointNotFoundError, match="must not be empty") as caught:
            find_file(empty, NAME)
        assert repr(empty) in caught.value.received

    def test_a_file_is_no_folder(self, tmp_path):
        (tmp_path / NAME).touch()
        with pytest.raises(CheckpointNotFoundError, match="a file, not a folder"):
            find_file(tmp_path / NAME, NAME)

    def test_what_counts_as_local(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "here").mkdir()
        local = ["here", "alone", "./x", "/x", "a/b/c", "", "~"]
        remote = ["user/repo", "user/repo@v1", "hf://user/repo/a/b", "user/repo@v1/sub/folder"]
        assert [is_local(identifier) for identifier in local] == [True] * len(local)
        assert [is_local(identifier) for identifier in remote] == [False] * len(remote)


class TestCache:
    @pytest.mark.parametrize(
        ("identifier", "options", "rank"),
        [
            ("user/repo", {}, 2),
            ("user/repo", {"revision": "v1"}, 1),
            ("user/repo", {"revision": OLD}, 1),
            ("user/repo@v1", {}, 1),
            ("user/repo@v1", {"revision": "main"}, 1),
            (f"user/repo@{OLD}", {}, 1),
            ("user/repo", {"subfolder": "math"}, 12),
            ("user/repo@v1/math", {}, 11),
            ("hf://user/repo", {}, 2),
            ("hf://models/user/repo", {}, 2),
            ("hf://user/repo/math", {}, 12),
            ("hf://user/repo@v1/math/", {}, 11),
            ("hf://user/repo@v1", {"subfolder": "math"}, 11),
        ],
    )
    def test_revision_and_subfolder(self, offline, identifier, options, rank):
        assert rank_at(identifier, replace(offline, **options)) == rank

    def test_the_environment_s_offline_mode(self, cache, no_network, monkeypatch):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert rank_at("user/repo", HubOptions(cache_dir=cache)) == 2
        with pytest.raises(CheckpointNotFoundError, match="not in the cache"):
            find_file("user/other", NAME, HubOptions(cache_dir=cache))

    @pytest.mark.parametrize(
        ("identifier", "changes"),
        [("user/other", {}), ("user/repo", {"revision": "v9"}), ("user/repo", {"subfolder": "nowhere"})],
    )
    def test_what_is_not_cached_says_that_the_hub_was_not_asked(self, offline, identifier, changes):
        with pytest.raises(CheckpointNotFoundError) as caught:
            find_file(identifier, NAME, replace(offline, **changes))
        assert repr(identifier) in caught.value.received
        assert all(value in caught.value.received for value in changes.values())
        assert "HF_HUB_OFFLINE" in caught.value.remedy

    def test_a_later_file_is_found_although_an_earlier_one_is_not_cached(self, offline):
        assert find_any("user/repo", ("weights", NAME), offline) is not None

    def test_configurations_come_from_the_cache(self, cache, no_network):
        config = PeftConfig.from_pretrained(
            "user/repo", revision="v1", subfolder="math", cache_dir=cache, local_files_only=True
        )
        assert isinstance(config, LoraConfig)
        assert config.r == 11

    def test_an_identifier_that_cannot_be_one(self, offline):
        with pytest.raises(CheckpointNotFoundError, match="cannot be an id") as caught:
            find_file("user/..repo--x", NAME, offline)
        assert "user/..repo--x" in caught.value.received


class TestHub:
    """`hf_hub_download` replaced by a fake."""

    @pytest.fixture
    def asked(self, monkeypatch, tmp_path):
        calls = []

        def download(repo_id, filename, **kwargs):
            calls.append((repo_id, filename, kwargs))
            return str(tmp_path / filename)

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        return calls

    def test_every_option_is_passed_on(self, asked, tmp_path):
        options = HubOptions("v2", "sub", "secret", tmp_path, local_files_only=True, force_download=True)
        find_file("user/repo", NAME, options)
        assert asked == [
            (
                "user/repo",
                NAME,
                {
                    "revision": "v2",
                    "subfolder": "sub",
                    "token": "secret",
                    "cache_dir": tmp_path,
                    "local_files_only": True,
                    "force_download": True,
                },
            )
        ]

    @pytest.mark.parametrize(
        ("identifier", "revision"),
        [("user/repo@refs/pr/7/sub", "refs/pr/7"), ("hf://user/repo@feature%2Fx/sub", "feature/x")],
    )
    def test_revisions_with_a_slash(self, asked, identifier, revision):
        find_file(identifier, NAME)
        assert asked[0][2]["revision"] == revision
        assert asked[0][2]["subfolder"] == "sub"

    def failing(self, monkeypatch, kind, message="no"):
        response = SimpleNamespace(headers={}, request=None, status_code=404)
        takes_response = issubclass(kind, errors.HfHubHTTPError)
        error = kind(message, response=response) if takes_response else kind(message)

        def download(*_args, **_kwargs):
            raise error

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        return error

    @pytest.mark.parametrize(
        ("kind", "rule", "remedy"),
        [
            (errors.GatedRepoError, "gated", "access"),
            (errors.RepositoryNotFoundError, "repository on the Hub", "token="),
            (errors.RevisionNotFoundError, "revision", "revision="),
            (errors.LocalEntryNotFoundError, "cache", "connect"),
            (errors.OfflineModeIsEnabled, "cache", "HF_HUB_OFFLINE"),
            (errors.HfHubHTTPError, "available on the Hub", "above"),
            (ConnectionError, "available on the Hub", "above"),
        ],
    )
    def test_the_hub_s_errors_become_ours(self, monkeypatch, kind, rule, remedy):
        cause = self.failing(monkeypatch, kind)
        with pytest.raises(CheckpointNotFoundError) as caught:
            find_file("user/repo@v3", NAME)
        assert rule in caught.value.rule
        assert "'user/repo'" in caught.value.received
        assert "v3" in caught.value.received
        assert remedy in caught.value.remedy
        assert caught.value.__cause__ is cause

    def test_a_file_that_the_repository_lacks_is_none(self, monkeypatch):
        self.failing(monkeypatch, errors.RemoteEntryNotFoundError)
        assert find_file("user/repo", NAME) is None


def test_options_from_keywords_name_the_unknown():
    assert HubOptions.from_kwargs({"revision": "v1", "token": True}) == HubOptions(revision="v1", token=True)
    with pytest.raises(ConfigurationError, match="proxies") as caught:
        HubOptions.from_kwargs({"proxies": {}})
    assert "cache_dir" in caught.value.remedy


def test_options_hide_the_token():
    assert "secret" not in repr(HubOptions(token="secret"))
    assert pickle.loads(pickle.dumps(HubOptions(token="secret"))).token == "secret"


def test_moving_options():
    options = HubOptions(revision="v1", subfolder="a", token="t", local_files_only=True)
    assert options.below("b") == HubOptions(revision="v1", subfolder="a/b", token="t", local_files_only=True)
    assert options.elsewhere() == HubOptions(token="t", local_files_only=True)


def test_names_at_a_place(tmp_path, monkeypatch):
    (tmp_path / "checkpoint-10").mkdir()
    (tmp_path / "notes.txt").touch()
    assert names_in(tmp_path, HubOptions()) == ["checkpoint-10", "notes.txt"]
    assert names_in(tmp_path, HubOptions(subfolder="checkpoint-10")) == []
    assert names_in(tmp_path / "gone", HubOptions()) == []
    asked = []

    def files(repo, *, revision, token):
        asked.append((repo, revision, token))
        return ["README.md", "run/checkpoint-10/adapter_config.json", "run/log.txt"]

    monkeypatch.setattr(huggingface_hub, "list_repo_files", files)
    assert names_in("user/repo@v1", HubOptions()) == ["README.md", "run"]
    assert names_in("hf://user/repo/run", HubOptions(token="t")) == ["checkpoint-10", "log.txt"]
    assert names_in("user/repo", HubOptions(local_files_only=True)) == []
    assert asked == [("user/repo", "v1", None), ("user/repo", None, "t")]

    def fail(*_args, **_kwargs):
        raise errors.OfflineModeIsEnabled("offline")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", fail)
    assert names_in("user/repo", HubOptions()) == []

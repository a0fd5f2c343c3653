"""Where arrays are kept."""

from pathlib import Path

import pytest
import torch

from fedgradnorm.federations.cache import cache_folder


@pytest.mark.parametrize(
    ("variable", "value", "folder"),
    [
        ("FEDGRADNORM_CACHE", "~/own", "own"),
        ("XDG_CACHE_HOME", "/elsewhere", "/elsewhere/fedgradnorm"),
        ("XDG_CACHE_HOME", "", ".cache/fedgradnorm"),
    ],
)
def test_the_cache_folder_is_the_one_asked_for_or_the_users(monkeypatch, variable, value, folder):
    for name in ("FEDGRADNORM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, value)
    assert cache_folder() == Path.home() / folder


def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch):
    from fedgradnorm.federations.cache import cached_arrays

    monkeypatch.setenv("FEDGRADNORM_CACHE", "/dev/null/nowhere")
    assert cached_arrays("x", {}, lambda: {"a": torch.zeros(2).numpy()})["a"].shape == (2,)

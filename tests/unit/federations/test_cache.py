"""Where arrays are kept."""

from pathlib import Path

import pytest

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

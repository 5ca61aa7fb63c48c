"""Brings `reference.session` into every process that runs tests. The one that hands them out does without: what that
imports takes seconds."""

import pytest


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    """`dsession` is pytest-xdist's name for the process that hands out tests."""
    if not config.pluginmanager.hasplugin("dsession"):
        config.pluginmanager.import_plugin("reference.session")

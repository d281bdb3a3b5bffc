"""Names of normalizations, and modules that bring more."""

import sys
from typing import Any

import pytest
import torch

from sinkformer_pl.errors import UserError
from sinkformer_pl.normalizations import ScoreNormalization, Sinkhorn, Softmax, load_plugins, register, registered
from sinkformer_pl.normalizations import registry as registry_module

PLUGIN = """
from sinkformer_pl.normalizations import ScoreNormalization, register

@register
class FromPlugin(ScoreNormalization):
    def forward(self, scores, mask):
        return scores
"""


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    monkeypatch.setattr(registry_module, "_registered", registered())


@pytest.fixture
def plugin_folder(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [n for n in sys.modules if n.startswith("plugin_of_a_test")]:
        del sys.modules[name]


def make(name: str) -> Any:
    return type(name, (ScoreNormalization,), {"forward": lambda self, scores, mask: scores, "__qualname__": name})


def test_the_packages_own_are_known():
    assert registered()["Sinkhorn"] is Sinkhorn
    assert registered()["Softmax"] is Softmax


def test_register_gives_the_class_back_and_makes_it_known():
    cls = make("Mine")
    assert register(cls) is cls
    assert registered()["Mine"] is cls
    assert list(registered())[-1] == "Mine"


def test_what_registered_gives_is_a_copy():
    registered()["Other"] = Softmax
    assert "Other" not in registered()


def test_a_taken_name_is_refused():
    with pytest.raises(
        ValueError, match=r"Softmax is taken by sinkformer_pl.normalizations.softmax.Softmax; give your"
    ):
        register(make("Softmax"))
    assert registered()["Softmax"] is Softmax


def test_the_same_class_again_replaces_itself_as_in_a_notebook():
    first, second = make("Mine"), make("Mine")
    register(first)
    register(second)
    assert registered()["Mine"] is second


def test_an_abstract_class_is_refused():
    class Unfinished(ScoreNormalization):
        pass

    with pytest.raises(TypeError, match="Unfinished can't be registered before it defines forward"):
        register(Unfinished)
    assert "Unfinished" not in registered()


@pytest.mark.parametrize("thing", [torch.nn.Softmax, torch.softmax, Sinkhorn(), 3])
def test_what_is_no_normalization_is_refused(thing: Any):
    with pytest.raises(TypeError, match="register takes a subclass of AttentionNormalization"):
        register(thing)


def test_plugins_are_imported(plugin_folder):
    (plugin_folder / "plugin_of_a_test.py").write_text(PLUGIN)
    assert "FromPlugin" not in registered()
    load_plugins(["plugin_of_a_test"])
    assert registered()["FromPlugin"].__module__ == "plugin_of_a_test"
    load_plugins(["plugin_of_a_test"])  # again is no error


def test_plugins_in_packages_are_imported(plugin_folder):
    package = plugin_folder / "plugin_of_a_test_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "inner.py").write_text(PLUGIN)
    load_plugins(["plugin_of_a_test_package.inner"])
    assert registered()["FromPlugin"].__module__ == "plugin_of_a_test_package.inner"


@pytest.mark.parametrize("name", ["no_such_plugin", "no_such_package.inner", "json.no_such_module"])
def test_a_missing_plugin_is_named(name):
    with pytest.raises(UserError, match=f"--plugins {name}: no module of this name") as error:
        load_plugins([name])
    assert "\n" not in str(error.value)


def test_what_a_plugin_fails_to_import_is_not_taken_for_the_plugin(plugin_folder):
    (plugin_folder / "plugin_of_a_test_broken.py").write_text("import a_dependency_that_is_missing")
    with pytest.raises(ValueError, match=r"importing it failed: .*a_dependency_that_is_missing"):
        load_plugins(["plugin_of_a_test_broken"])


def test_entry_points_of_installed_packages_are_imported(plugin_folder):
    (plugin_folder / "plugin_of_a_test.py").write_text(PLUGIN)
    info = plugin_folder / "some_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[sinkformer_pl.plugins]\nany_name = plugin_of_a_test\n")
    load_plugins()
    assert "FromPlugin" in registered()

"""What stands around the code: order of the tests, versions that must agree, workflows, the licence."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from dsserve import __version__
from tests.conftest import KINDS, ROOT, pytest_collection_modifyitems
from tests.unit.scripts.test_makefile import dry_run

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def project() -> dict[str, Any]:
    return tomllib.loads(text("pyproject.toml"))


def workflow(name: str) -> dict[str, Any]:
    return yaml.safe_load(text(f".github/workflows/{name}.yml"))


def test_unit_tests_run_first_and_nothing_moves_within_a_folder() -> None:
    paths = [
        "e2e/b.py",
        "contract/a.py",
        "unit/z.py",
        "e2e/a.py",
        "unit/a.py",
        "gpu/a.py",
        "distributed/a.py",
        "faults/a.py",
    ]
    items = [SimpleNamespace(path=Path(ROOT, "tests", path), add_marker=lambda mark: None) for path in paths]
    pytest_collection_modifyitems(items)  # type: ignore[arg-type]
    after = [str(item.path.relative_to(ROOT / "tests")) for item in items]
    assert [path for path in after if path.startswith(("unit", "e2e"))] == [
        "unit/z.py",
        "unit/a.py",
        "e2e/b.py",
        "e2e/a.py",
    ]
    assert list(dict.fromkeys(path.split("/")[0] for path in after)) == list(KINDS)


def test_pre_commit_has_the_ruff_of_make_check() -> None:
    (version,) = re.findall(r"^ruff==(.+)$", text("constraints.txt"), flags=re.MULTILINE)
    (hooks,) = yaml.safe_load(text(".pre-commit-config.yaml"))["repos"]
    assert hooks["rev"] == f"v{version}"


def exact_versions() -> dict[str, str]:
    """Package -> version, where pyproject.toml allows one alone."""
    stated = project()["project"]
    optional = [one for extra in stated["optional-dependencies"].values() for one in extra]
    pins = (one.split("==") for one in (*stated["dependencies"], *optional) if "==" in one)
    return dict(pins)


def test_the_projects_version_is_read_from_the_package() -> None:
    assert project()["project"]["dynamic"] == ["version"] and "version" not in project()["project"]
    source = text(project()["tool"]["hatch"]["version"]["path"])
    assert re.findall(r'^__version__ = "(.+)"$', source, flags=re.MULTILINE) == [__version__]


def test_versions_that_a_text_has_to_spell_are_those_of_the_package() -> None:
    overlays = sorted((ROOT / "configs/kubernetes/overlays").glob("*/kustomization.yaml"))
    texts = [text("configs/docker/Dockerfile"), *(path.read_text(encoding="utf-8") for path in overlays)]
    tags = [tag for one in texts for tag in re.findall(r"(?:dsserve:|newTag: )([\d.]+)-[cg]pu", one)]
    assert len(tags) >= 5 and set(tags) == {__version__}
    assert re.findall(r"^## ([\d.]+)$", text("CHANGELOG.md"), flags=re.MULTILINE)[0] == __version__


def test_pins_that_are_spelled_again_agree() -> None:
    pins = exact_versions()
    assert set(pins) == {"deepspeed", "torchserve", "torch-model-archiver", "torchao"}
    constraints = dict(re.findall(r"^([\w-]+)==(\S+)$", text("constraints.txt"), flags=re.MULTILINE))
    assert pins == {name: constraints[name] for name in pins}
    for page in ("README.md", "docs/support.md"):
        prose = " ".join(text(page).split())
        assert f"DeepSpeed {pins['deepspeed']}" in prose and f"TorchServe {pins['torchserve']}" in prose, page
    for name in ("docs/settings.md", "handlers/dsserve/modeling/quantization.py"):
        assert re.findall(r"torchao==([\d.]+\d)", text(name)) == [pins["torchao"]], name


def test_changes_are_tested_on_the_oldest_and_the_newest_python() -> None:
    pythons = workflow("test")["jobs"]["change"]["strategy"]["matrix"]["python"]
    oldest, above = re.findall(r"3\.(\d+)", project()["project"]["requires-python"])
    assert pythons[0] == f"3.{oldest}" and pythons[-1] == f"3.{int(above) - 1}"


@pytest.mark.parametrize("name", ["test", "images"])
def test_workflows_call_targets_that_exist_and_publish_nothing(name: str) -> None:
    content = text(f".github/workflows/{name}.yml")
    targets = set(re.findall(r"^([a-z-]+):", text("Makefile"), flags=re.MULTILINE))
    assert set(re.findall(r"make ([a-z-]+)", content)) <= targets
    assert workflow(name)["permissions"] == {"contents": "read"}


def test_all_tests_run_each_night() -> None:
    assert workflow("test")["jobs"]["night"]["strategy"]["matrix"]["target"] == ["test", "test-long", "test-faults"]


def test_the_licence_is_named_and_shipped() -> None:
    assert project()["project"]["license"] == "Apache-2.0"
    licence = text("LICENSE")
    assert "Version 2.0, January 2004" in licence and "END OF TERMS AND CONDITIONS" in licence
    assert "LICENSE" in project()["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert "!LICENSE" in text(".dockerignore").splitlines()
    assert text("configs/docker/Dockerfile").count("COPY LICENSE") == 2


def test_what_the_sdist_names_exists() -> None:
    assert all((ROOT / name).exists() for name in project()["tool"]["hatch"]["build"]["targets"]["sdist"]["include"])


def test_classifiers_are_the_pythons_that_are_allowed() -> None:
    named = [int(name.rsplit(".", 1)[1]) for name in project()["project"]["classifiers"] if "Python :: 3." in name]
    oldest, above = map(int, re.findall(r"3\.(\d+)", project()["project"]["requires-python"]))
    assert named == list(range(oldest, above))


def test_the_site_is_strict_and_nothing_is_installed_into_a_named_python() -> None:
    lines = dry_run("docs", f"PYTHON={sys.executable}").splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["-m mkdocs build --strict"]
    assert "'.[docs]'" in dry_run("-B", "docs", "PYTHON=") and "'.[docs]'" not in dry_run("-B", "setup", "PYTHON=")


def test_unit_tests_can_be_run_alone() -> None:
    assert dry_run("test-unit", f"PYTHON={sys.executable}").splitlines()[-1].endswith("not long' tests/unit")


def test_the_site_copies_what_a_page_links_to() -> None:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: `make docs` installs it")
    from mkdocs.structure.files import File, Files

    from scripts.docs.docs_site import on_page_markdown

    config: Any = SimpleNamespace(config_file_path=str(ROOT / "mkdocs.yml"), site_dir="site", use_directory_urls=False)
    config.plugins = SimpleNamespace(_current_plugin=None)
    page = SimpleNamespace(file=File("measurements/index.md", str(ROOT / "docs"), "site", False))
    files = Files([])
    given = "[a](../../configs/openapi.json) [b](../api.md#errors) [c](../../configs/none.json) [d](https://x.org/y)"
    found = on_page_markdown(given, page=page, config=config, files=files)
    assert found == given.replace("../../configs/openapi.json", "../repository/configs/openapi.json")
    assert [file.src_uri for file in files] == ["repository/configs/openapi.json"]

"""Every study of the catalog offers what the command line and the dashboard ask of it."""

import ast
import dataclasses
import inspect
import itertools
import subprocess
import sys

import pytest

from analyses.catalog import STUDIES, Study, StudyModule, find_study, load_study
from probe.errors import UserError

OFFERED = ("estimate", "measure", "figures", "run")


def test_names_are_the_command_lines_own_and_differ():
    names = [study.name for study in STUDIES]
    assert len(set(names)) == len(names)
    assert all(name.replace("-", "").isalnum() and name == name.lower() for name in names)


def test_an_unknown_study_is_told_in_a_sentence():
    assert find_study("ksparse").module == "analyses.ksparse"
    with pytest.raises(UserError, match=r"'ksparce' is no study; wanted one of .*ksparse"):
        load_study("ksparce")


def test_the_catalog_imports_no_study():
    modules = [study.module for study in STUDIES]
    code = f"import sys, analyses.catalog; sys.exit(bool(set({modules}) & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_every_study_keeps_the_contract(study: Study):
    module = load_study(study.name)
    config = module.Config
    assert dataclasses.is_dataclass(config) and config.__dataclass_params__.frozen
    assert f"lorgnette analyse {study.name}" in (config.__doc__ or ""), "give an example"
    for name in OFFERED:
        wanted = list(inspect.signature(getattr(StudyModule, name)).parameters)[1:]
        given = inspect.signature(getattr(module, name)).parameters
        assert list(given) == wanted, f"{study.module}.{name} takes {list(given)}, not {wanted}"


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_every_option_is_explained(study: Study):
    """Each field of a Config is followed by its docstring, which `--help` shows."""
    (declared,) = ast.parse(inspect.getsource(load_study(study.name).Config)).body
    assert isinstance(declared, ast.ClassDef)
    for field, following in itertools.pairwise([*declared.body, None]):
        if isinstance(field, ast.AnnAssign):
            explained = isinstance(following, ast.Expr) and isinstance(
                following.value, ast.Constant
            )
            assert explained, f"{study.module}.Config: explain {ast.unparse(field.target)}"

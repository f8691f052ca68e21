"""What our code never does: unpickle, run what it reads, start a shell, or check by `assert`."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("api", "grit_client", "grit_core", "migrations", "store", "worker")
FILES = sorted(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))

MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
"""Reading one of their files runs what is in it."""
CALLS = {
    *("eval", "exec", "compile", "__import__"),
    *("torch.load", "torch.save", "torch.hub.load", "torch.jit.load", "numpy.load", "np.load"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load"),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("tarfile.extractall", "shutil.unpack_archive"),
}
KEYWORDS = {"shell": True, "trust_remote_code": True, "allow_pickle": True, "weights_only": False}


def offences(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        match node:
            case ast.Assert():
                yield f"{line}: assert vanishes under -O; raise instead"
            case ast.Import(names=names):
                yield from (
                    f"{line}: import {each.name}"
                    for each in names
                    if each.name.partition(".")[0] in MODULES
                )
            case ast.ImportFrom(module=str(module)) if module.partition(".")[0] in MODULES:
                yield f"{line}: from {module} import"
            case ast.Call():
                yield from of_call(node)
            case _:
                pass


def of_call(call: ast.Call) -> Iterator[str]:
    name = ast.unparse(call.func)
    if name in CALLS or name.endswith((".extractall", ".unsafe_load")):
        yield f"{call.lineno}: {name}()"
    if name.endswith(("from_pretrained", "from_config")):
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        trusted = given.get("trust_remote_code")
        if trusted is not None and not (
            isinstance(trusted, ast.Constant) and trusted.value is False
        ):
            yield f"{call.lineno}: {name}(trust_remote_code={ast.unparse(trusted)})"
    for keyword in call.keywords:
        value = keyword.value
        if (
            keyword.arg in KEYWORDS
            and isinstance(value, ast.Constant)
            and value.value is KEYWORDS[keyword.arg]
        ):
            yield f"{call.lineno}: {name}({keyword.arg}={value.value})"


def test_our_code_never_runs_what_it_reads() -> None:
    assert len(FILES) > 150
    found = [
        f"{file.relative_to(ROOT)}:{offence}"
        for file in FILES
        for offence in offences(ast.parse(file.read_text(encoding="utf-8")))
    ]
    assert found == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from joblib import load",
        "import torch\ntorch.load(f, weights_only=True)",
        "eval(text)",
        "yaml.load(text)",
        "subprocess.run(text, shell=True)",
        "Auto.from_pretrained(x, trust_remote_code=True)",
        "Auto.from_pretrained(x, trust_remote_code=asked)",
        "np.load(x, allow_pickle=True)",
        "zipfile.ZipFile(x).extractall(y)",
        "assert x > 0",
    ],
)
def test_the_search_finds_each_of_them(code: str) -> None:
    assert list(offences(ast.parse(code)))

"""Functions and files stay short, and a few things stay out of the code altogether (CONTRIBUTING.md).

The limits, and the ported files that may exceed them, stand in setup.cfg under [gcpo:limits].
"""

import ast
import configparser
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "joblib"}
FORBIDDEN_KEYWORDS = {"weights_only": False, "shell": True, "allow_pickle": True}
# The reader of the old reward servers, opt-in: it may subclass the unpickler, and may not load with the plain one.
PICKLE_ALLOWED = {"reward_funcs/_remote_legacy.py": {"Unpickler", "UnpicklingError", "dumps"}}
BROAD = {"Exception", "BaseException"}
LOG_METHODS = {"warning", "error", "exception", "critical"}

_CONFIG = configparser.ConfigParser()
_CONFIG.read(ROOT / "setup.cfg")
LIMITS = _CONFIG["gcpo:limits"]
FUNCTION_LINES, FILE_LINES = LIMITS.getint("function_lines"), LIMITS.getint("file_lines")
EXCEPTIONS = {line.split()[0]: line.split()[1:] for line in LIMITS["exceptions"].splitlines() if line.strip()}


def too_long(path: str, source: str) -> Iterator[tuple[str, str]]:
    """Name (`path` or `path::Class.method`) and what is too long about it. A function counts from `def` to its end."""
    lines = len(source.splitlines())
    if lines > FILE_LINES:
        yield path, f"{lines} lines, over {FILE_LINES}"
    for name, node in _functions(ast.parse(source)):
        length = node.end_lineno - node.lineno + 1
        if length > FUNCTION_LINES:
            yield f"{path}::{name}", f"{length} lines, over {FUNCTION_LINES}"


def _functions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for child in ast.iter_child_nodes(node):
        name = f"{prefix}{getattr(child, 'name', '')}"
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield name, child
        inside = f"{name}." if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) else prefix
        yield from _functions(child, inside)


def forbidden(path: str, source: str) -> list[str]:
    """Each thing in the file that has no place in the code, as one line of text."""
    allowed = PICKLE_ALLOWED.get(path)
    check = _wrong_with if allowed is None else functools.partial(_wrong_with_pickle, allowed)
    found = ((node, check(node)) for node in ast.walk(ast.parse(source)))
    return [f"{path}:{node.lineno} {reason}" for node, reason in found if reason]


def _wrong_with(node: ast.AST) -> str | None:
    match node:
        case ast.Import(names=names) if bad := {n.name.partition(".")[0] for n in names} & FORBIDDEN_MODULES:
            return f"imports {bad.pop()}, which runs code from the file it reads"
        case ast.ImportFrom(module=str(module)) if module.partition(".")[0] in FORBIDDEN_MODULES:
            return f"imports {module}, which runs code from the file it reads"
        case ast.Call(func=ast.Name(id="print")):
            return "prints; log it instead"
        case ast.keyword(arg=str(arg), value=ast.Constant(value=bool(value))) if FORBIDDEN_KEYWORDS.get(arg) is value:
            return f"{arg}={value}"
        case ast.ExceptHandler() if _is_broad(node.type) and not _speaks(node):
            return "catches everything and says nothing; name the exception, raise, or log it"
        case ast.Call(func=ast.Attribute(attr="suppress") | ast.Name(id="suppress"), args=args) if any(
            map(_is_broad, args)
        ):
            return "suppresses everything; name the exception"
    return None


def _wrong_with_pickle(allowed: set[str], node: ast.AST) -> str | None:
    match node:
        case ast.Import(names=[ast.alias(name="pickle", asname=None)]):
            return None
        case ast.Attribute(value=ast.Name(id="pickle"), attr=attr) if attr not in allowed:
            return f"uses pickle.{attr}; only {', '.join(sorted(allowed))} are allowed here"
    return _wrong_with(node)


def _is_broad(type_: ast.expr | None) -> bool:
    if isinstance(type_, ast.Tuple):
        return any(map(_is_broad, type_.elts))
    return type_ is None or (isinstance(type_, ast.Name) and type_.id in BROAD)


def _speaks(handler: ast.ExceptHandler) -> bool:
    """Whether the handler raises or logs; a bare `except:` may only raise."""
    nodes = [node for statement in handler.body for node in ast.walk(statement)]
    raises = any(isinstance(node, ast.Raise) for node in nodes)
    logs = any(isinstance(node, ast.Attribute) and node.attr in LOG_METHODS for node in nodes)
    return raises or (logs and handler.type is not None)


def sources() -> list[tuple[str, str]]:
    paths = sorted(path for package in ("gcpo_trl", "reward_funcs") for path in (ROOT / package).rglob("*.py"))
    return [(path.relative_to(ROOT).as_posix(), path.read_text()) for path in paths]


def test_functions_and_files_are_short():
    found = dict(pair for path, source in sources() for pair in too_long(path, source))
    wrong = [f"{name}: {what}" for name, what in found.items() if name not in EXCEPTIONS]
    assert not wrong, "\n".join(["too long; split it:", *wrong])


def test_every_exception_is_needed_and_has_a_reason():
    found = dict(pair for path, source in sources() for pair in too_long(path, source))
    stale = sorted(set(EXCEPTIONS) - set(found))
    unexplained = sorted(name for name, reason in EXCEPTIONS.items() if not reason)
    assert not stale, f"within the limits, or gone: take {stale} out of setup.cfg"
    assert not unexplained, f"say in setup.cfg why {unexplained} may be long"


def test_nothing_forbidden():
    wrong = [line for path, source in sources() for line in forbidden(path, source)]
    assert not wrong, "\n".join(["", *wrong])


def test_the_check_counts_lines_from_def_to_end():
    body = "    pass\n" * (FUNCTION_LINES - 1)
    assert list(too_long("a.py", f"class A:\n @property\n def f(self):\n{body}")) == []
    assert list(too_long("a.py", f"class A:\n @property\n def f(self):\n{body}    pass\n")) == [
        ("a.py::A.f", f"{FUNCTION_LINES + 1} lines, over {FUNCTION_LINES}")
    ]
    assert [name for name, _ in too_long("a.py", f"if True:\n  async def g():\n{body}    pass\n")] == ["a.py::g"]
    assert [name for name, _ in too_long("a.py", "x = 1\n" * (FILE_LINES + 1))] == ["a.py"]


@pytest.mark.parametrize(
    "source",
    [
        "def f():\n    import pickle",
        "from pickle import load",
        "print('done')",
        "torch.load(path, weights_only=False)",
        "subprocess.run('ls', shell=True)",
        "np.load(path, allow_pickle=True)",
        "try: f()\nexcept: pass",
        "try: f()\nexcept:\n    logger.warning('failed')",
        "try: f()\nexcept Exception: value = None",
        "try: f()\nexcept (OSError, Exception) as error: value = str(error)",
        "with contextlib.suppress(Exception): f()",
    ],
)
def test_the_check_sees_what_is_forbidden(source):
    assert len(forbidden("a.py", source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path, weights_only=True)",
        "subprocess.run(['ls'], check=True)",
        "try: f()\nexcept OSError: pass",
        "try: f()\nexcept Exception as error: raise ValueError('give a path') from error",
        "try: f()\nexcept Exception:\n    logger.exception('reward failed')",
        "with contextlib.suppress(FileNotFoundError): f()",
    ],
)
def test_the_check_lets_the_rest_pass(source):
    assert forbidden("a.py", source) == []


@pytest.mark.parametrize(
    "source", ["pickle.loads(b)", "pickle.load(f)", "from pickle import loads", "import pickle as p"]
)
def test_the_reader_of_old_servers_may_not_unpickle_freely(source):
    (path,) = PICKLE_ALLOWED
    assert len(forbidden(path, f"import pickle\n{source}")) == 1
    assert forbidden(path, "import pickle\nclass A(pickle.Unpickler): pass\npickle.dumps(1)") == []

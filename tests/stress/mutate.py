"""Change the code in one place at a time, and see whether the tests notice.

    python -m tests.stress.mutate [MODULE ...] --seed 0 --count 150
    python -m tests.stress.mutate --texts FILE

Mutants are drawn by a hash of what they change, not by their place: whoever is drawn on one commit is drawn
on the next, unless newcomers fill the count. What survives is printed as `Mutant.text` says it; with
``--texts``, a file of such lines, those mutants alone are run.

A module is a file such as ``formulations/relaxations/certified.py``; by default all of `TESTS`. Each mutant
runs the tests of its module in a copy of the packages, in a child process whose numba kernels are plain
Python (compiling takes longer than running them on small blocks). A mutant is killed if a test fails, or if
the tests take some times the processor time that they take on the code as it is (`PATIENCE`). What survives
and cannot be told from the original by any result that means something stands in `EQUIVALENT`, with the
reason. Exit code 1 if fewer than 95 % of the others are killed.

Before the first mutant of a module its tests must pass on the copy as it is.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import resource
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

HOME = Path(__file__).resolve().parents[2]
PACKAGES = ("formulations", "cbs_opt", "tests")
FAST = "tests/formulations/"
PROOF = tuple(FAST + name for name in ("test_allowances.py", "test_rounding.py", "test_verification.py"))
SPLITS = (FAST + "test_diagonal_splits.py",)
RELAXED = tuple(
    f"{FAST}test_relaxations.py::test_{name}"
    for name in (
        "perspective_solves_the_relaxation",
        "capped_simplex_solves_the_relaxation",
        "projection_onto_the_capped_simplex_is_optimal",
        "barrier_steps_climb_and_stay_feasible",
        "zero_weight_with_positive_shift_is_refused",
        "invalid_certificates_prove_nothing",
    )
)
STOPPED = tuple(
    f"{FAST}test_limits.py::test_{name}"
    for name in (
        "a_relaxation_cut_into_calls_ends_in_the_same_bits",
        "a_relaxation_is_stopped_between_its_steps_and_rises_with_them",
        "no_step_is_begun_of_which_less_than_half_fits",
    )
)
REDUCED = (FAST + "test_certificates.py::test_reducing_needs_fixings_of_this_block",)
LINEAR = (FAST + "test_linear_relaxations.py",)
KERNELS = tuple(FAST + name for name in ("test_active_sets.py", "test_allowances.py", "test_kernels.py"))
DENSE = ("tests/cbs_opt/select/selection_program/test_dense.py",)
RELAXATIONS = "formulations/relaxations/"
TESTS: dict[str, tuple[str, ...]] = {
    **{f"{RELAXATIONS}{name}.py": PROOF for name in ("certificate", "certified", "only_set")},
    f"{RELAXATIONS}reduction_rounding.py": PROOF,
    f"{RELAXATIONS}reduced_block.py": (*REDUCED, *PROOF),
    **{f"{RELAXATIONS}{name}.py": (*SPLITS, *PROOF, *RELAXED) for name in ("perspective", "capped_simplex")},
    f"{RELAXATIONS}linear.py": (*LINEAR, *PROOF),
    f"{RELAXATIONS}perspective_kernels.py": (*KERNELS, *SPLITS, *RELAXED),
    f"{RELAXATIONS}capped_simplex_kernels.py": (*KERNELS, *SPLITS, *RELAXED),
    f"{RELAXATIONS}ascent.py": (*KERNELS, *STOPPED),
    f"{RELAXATIONS}support_norm.py": (*KERNELS, *RELAXED),
    f"{RELAXATIONS}split_relaxation.py": (*SPLITS, *PROOF, *RELAXED),
    f"{RELAXATIONS}diagonal_split.py": (*SPLITS, *RELAXED, *PROOF),
    "formulations/verification.py": PROOF[::-1],
    "formulations/dense_forms.py": PROOF,
    "formulations/swap_kernels.py": KERNELS[::-1],
    "cbs_opt/select/selection_program/dense.py": DENSE,
}
"""Modules that are changed, and the tests that are to notice."""
PATIENCE = 3.0
"""A mutant counts as hung after so many times the processor time of its tests, and `LEAST` seconds."""
LEAST = 6
MOST = 300
"""Seconds of processor time within which the tests must pass on the code as it is."""
LARGEST_TOLERANCE = 1e-6
"""Numbers up to this size, and the halves of them, are as good as each other for what they are for."""
SURVIVED = "survived: "
WANTED = 0.95
"""Share of the mutants that mean something which must be killed."""
LARGER = "an allowance that is larger than it need be is as valid"
PREFILTER = "a first look at a point, whose value is computed again before it counts"
NONE_YET = "any number below 0 says that there is none yet"
STEADIES = "keeps a factorisation from failing; the step it leads to is feasible by one of its own"
UNSEEN = "1e-300 beside terms of 1e-140 and more, or a scale of 1"
EQUIVALENT = {
    f"{RELAXATIONS}certified.py:bounded_product: 4 -> 5": LARGER,
    f"{RELAXATIONS}capped_simplex_kernels.py:admm_step: "
    "-0.5 * np.dot(solved, product) -> np.dot(solved, product)": PREFILTER,
    f"{RELAXATIONS}perspective_kernels.py:admm_step: dual_value(solved, product, linear, ones, ascent.size) "
    "-> dual_value(product, solved, linear, ones, ascent.size)": PREFILTER,
    f"{RELAXATIONS}capped_simplex_kernels.py:project_capped_simplex: range(BISECTIONS) -> "
    "range(BISECTIONS - 1)": "the interval is 2^-60 of its width either way",
    "formulations/dense_forms.py:_joint_rounding: 2 -> 3": LARGER,
    f"{RELAXATIONS}reduction_rounding.py:joint_allowance: 1.01 * (quadratic + linear + constant) -> "
    "quadratic + linear + constant": "the rounding of an allowance whose constants have room shows nowhere",
    "cbs_opt/select/selection_program/dense.py:_best_pair: range(n) -> range(n - 1) (2)": (
        "the first scan only makes the second one shorter"
    ),
    f"{RELAXATIONS}perspective_kernels.py:move_support: 1 -> 2 (8)": NONE_YET,
    f"{RELAXATIONS}perspective_kernels.py:move_support: shared += 1 -> shared -= 1": (
        "the number is asked only whether it is 0"
    ),
    f"{RELAXATIONS}perspective_kernels.py:newton_support: share * sign[order[p]] -> "
    "share / sign[order[p]]": "a sign is 1 or -1",
    "formulations/swap_kernels.py:prune_joint: 1 -> 2": NONE_YET,
    "cbs_opt/select/selection_program/dense.py:_best_pair: 1 -> 2": NONE_YET,
    "cbs_opt/select/selection_program/dense.py:_best_pair: 1 -> 2 (2)": NONE_YET,
    "cbs_opt/select/selection_program/dense.py:swap_dense: 1 -> 0": "spares the start of threads, no more",
    f"{RELAXATIONS}support_norm.py:largest_sum: 1 -> 0 (6)": "what lies up to j is the largest either way",
    f"{RELAXATIONS}support_norm.py:largest_sum: count - 1 -> count + 1 (2)": (
        "orders a part that is not added up"
    ),
    f"{RELAXATIONS}reduction_rounding.py:joint_allowance: max(e1, e2) <= LARGEST_PERTURBATION -> "
    "max(e1, e2) < LARGEST_PERTURBATION": "a round number with room",
    "formulations/dense_forms.py:_selection_rounding: UNDERFLOW / scale -> UNDERFLOW * scale": UNSEEN,
    "formulations/dense_forms.py:_joint_rounding: UNDERFLOW / scale -> UNDERFLOW * scale": UNSEEN,
    f"{RELAXATIONS}support_norm.py:largest_sum: count - 1 -> count (2)": "orders a part that is not added up",
    f"{RELAXATIONS}capped_simplex_kernels.py:admm_step: -0.5 -> 0.5": PREFILTER,
    f"{RELAXATIONS}capped_simplex_kernels.py:admm_step: 0.5 -> 0.0": PREFILTER,
    f"{RELAXATIONS}diagonal_split.py:barrier_step: 1e-12 -> 0.0": STEADIES,
    f"{RELAXATIONS}diagonal_split.py:barrier_step: curvature[i, i] *= 1.0 + 1e-12 -> pass": STEADIES,
    f"{RELAXATIONS}support_norm.py:prox_support_norm: point[i] >= 0.0 -> point[i] > 0.0": (
        "of an entry that is 0 nothing is left to be shared"
    ),
    f"{RELAXATIONS}diagonal_split.py:barrier_step: 1e-06 -> 0.0": "gives up later",
    f"{RELAXATIONS}perspective_kernels.py:move_support: 1e-12 -> 0.0": "a larger share tells what moves",
    "formulations/dense_forms.py:_lowest_and_minimiser: range(ESTIMATE_STEPS) -> range(ESTIMATE_STEPS - 1)": (
        "an estimate, of which a share is proved"
    ),
    f"{RELAXATIONS}support_norm.py:largest_sum: count >= n -> count > n": "all of n are added up either way",
    f"{RELAXATIONS}certified.py:largest_sum: count >= values.size -> count > values.size": (
        "all are added up either way"
    ),
    f"{RELAXATIONS}diagonal_split.py:barrier_step: candidate[i] > 0.0 -> candidate[i] >= 0.0": (
        "to come to 0 itself is a coincidence at full length, and shorter steps are shortened"
    ),
    f"{RELAXATIONS}capped_simplex_kernels.py:newton_simplex: 1.0 -> 0.5 (2)": (
        "what keeps a singular system solvable, half as large where the diagonal is small"
    ),
    f"{RELAXATIONS}perspective_kernels.py:name_places: image[i] >= 0.0 -> image[i] > 0.0": (
        "only entries that are not 0 share, and others need no sign"
    ),
    "formulations/dense_forms.py:_joint_rounding: 1e-09 -> 0.0": (
        "n gamma, which is taken off next, is more than the rounding of a quotient"
    ),
    "formulations/dense_forms.py:_selection_rounding: np.abs(np.diagonal(matrix)) -> np.diagonal(matrix)": (
        "the sum counts only where a dip is proved, and a negative diagonal has none"
    ),
    f"{RELAXATIONS}certified.py:bounded_product: problem.n + 4 + problem.n.bit_length() -> "
    "problem.n + 4": "a sum of n products and the damping are n + 2 roundings",
}
"""Mutants that no result tells from the original, as `Mutant.text` says them, and why."""
NAMED = (
    ("cbs_opt/select/selection_program/dense.py", "- norm[k] * norm_in <", "- 0.5 * norm[k] * norm_in <"),
    ("cbs_opt/select/selection_program/dense.py", "- norm[k] * norm_out <", "- 0.5 * norm[k] * norm_out <"),
    (f"{RELAXATIONS}certified.py", "return 4.0 * order * (", "return 0.0 * order * ("),
    (f"{RELAXATIONS}certified.py", "error_factor(problem.n + 4 + problem.n.bit_length()) * reach", "0.0"),
    (f"{RELAXATIONS}certified.py", "columns * moved + error_factor(8) * (", "0.0 * ("),
    (f"{RELAXATIONS}perspective.py", "error=0.5 * slack", "error=0.0 * slack"),
    ("formulations/incumbents.py", "min(bound if trivial is None", "max(bound if trivial is None"),
    ("formulations/solvers/conclusion.py", "min(max(proved), value)", "max(proved)"),
    ("cbs_opt/certify/certificates.py", "min(max(bounds), chosen.objective)", "max(bounds)"),
    ("formulations/verification.py", "if bound > ceiling:", "if False:"),
    ("formulations/verification.py", "if stated is not None and stated > ceiling:", "if False:"),
)
"""Mutants of old that survived once: module, text and what it becomes. All of them must be killed."""
NAMED_TESTS = (*DENSE, *PROOF, "tests/cbs_opt/certify/test_certificates.py::test_a_proved_bound_is_capped")

FLIPPED = {
    ast.Lt: ast.Gt,
    ast.Gt: ast.Lt,
    ast.LtE: ast.GtE,
    ast.GtE: ast.LtE,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
STRICT = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt}
ARITHMETIC = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}
EXTREMES = {"min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum"}
SKIPPED = (ast.Raise, ast.JoinedStr, ast.Assert)
CAPS = ("abs", "max", "min", "maximum", "minimum", "sqrt")


Operator = Callable[[ast.AST], ast.AST | None]
Step = tuple[str, int | None]


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One change: the module, the function around it, the operator, and the node that it replaces."""

    module: str
    function: str
    operator: Operator
    path: tuple[Step, ...]
    line: int
    before: str
    after: str
    number: int = 1

    @property
    def text(self) -> str:
        """The change in one line, without its place, as it may move; of several the same, which one it is."""
        which = f" ({self.number})" if self.number > 1 else ""
        return f"{self.module}:{self.function}: {self.before} -> {self.after}{which}"

    @property
    def equivalent(self) -> bool:
        """Whether nothing that means something tells it from the original.

        Beside those of `EQUIVALENT`: a number of roundings that is one more than it was (`LARGER`), half of
        a number that tells rounding from a difference (to make it 0 is another mutant, which counts), and
        inner products and products with symmetric matrices the other way round.
        """
        if self.operator is constant_doubled:
            tolerance = "." in self.after or "e-" in self.after
            small = tolerance and float(self.after) <= LARGEST_TOLERANCE
            return small or self.text in EQUIVALENT or self._counts_roundings()
        symmetric = self.operator is arguments_swapped and self.before.startswith("np.dot(")
        return symmetric or self.text in EQUIVALENT

    def _counts_roundings(self) -> bool:
        node: ast.AST = ast.parse((HOME / self.module).read_text())
        for name, index in self.path:
            value = getattr(node, name)
            node = value if index is None else value[index]
            if isinstance(node, ast.Call) and _name(node.func) == "error_factor":
                return True
        return False

    def source(self) -> str:
        """Return the module with the change."""
        tree = ast.parse((HOME / self.module).read_text())
        parent, node = _at(tree, self.path)
        replaced = self.operator(node)
        assert replaced is not None
        _put(parent, self.path[-1], replaced)
        return ast.unparse(ast.fix_missing_locations(tree))


def comparison_flipped(node: ast.AST) -> ast.AST | None:
    """``a < b`` to ``a > b``."""
    return _compared(node, FLIPPED)


def comparison_strict(node: ast.AST) -> ast.AST | None:
    """``a < b`` to ``a <= b``, and back."""
    return _compared(node, STRICT)


def _compared(node: ast.AST, exchange: dict[type[ast.cmpop], type[ast.cmpop]]) -> ast.AST | None:
    if isinstance(node, ast.Compare) and type(node.ops[0]) in exchange:
        node.ops[0] = exchange[type(node.ops[0])]()
        return node
    return None


def arithmetic(node: ast.AST) -> ast.AST | None:
    """Plus to minus and times to divided by, and back."""
    if isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in ARITHMETIC:
        node.op = ARITHMETIC[type(node.op)]()  # type: ignore[abstract]
        return node
    return None


def term_dropped(node: ast.AST) -> ast.AST | None:
    """``a + b`` and ``a - b`` to ``a``: an error term, a margin, an allowance."""
    return node.left if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub) else None


def factor_dropped(node: ast.AST) -> ast.AST | None:
    """``a * b`` to ``b``: the unit roundoff, a step, a share."""
    return node.right if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult) else None


def constant_zero(node: ast.AST) -> ast.AST | None:
    """A number to 0."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float) and node.value != 0:
        node.value = type(node.value)(0)
        return node
    return None


def constant_doubled(node: ast.AST) -> ast.AST | None:
    """A number to half of it if it is a fraction, to one more if it is whole."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float) and node.value != 0:
        node.value = node.value + 1 if isinstance(node.value, int) else 0.5 * node.value
        return node
    return None


def extremes(node: ast.AST) -> ast.AST | None:
    """Min to max and back."""
    if isinstance(node, ast.Call):
        name = _name(node.func)
        if name in EXTREMES:
            if isinstance(node.func, ast.Attribute):
                node.func.attr = EXTREMES[name]
            else:
                node.func = ast.Name(id=EXTREMES[name], ctx=ast.Load())
            return node
    return None


def cap_removed(node: ast.AST) -> ast.AST | None:
    """``abs(x)``, ``max(x, y)`` and the like to ``x``."""
    if isinstance(node, ast.Call) and _name(node.func) in CAPS and node.args:
        return node.args[0]
    return None


def negation_dropped(node: ast.AST) -> ast.AST | None:
    """``not x``, ``~x`` and ``-x`` to ``x``."""
    return node.operand if isinstance(node, ast.UnaryOp) else None


def connective(node: ast.AST) -> ast.AST | None:
    """``and`` to ``or`` and back."""
    if isinstance(node, ast.BoolOp):
        node.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        return node
    return None


def arguments_swapped(node: ast.AST) -> ast.AST | None:
    """The first two arguments of a call exchanged, unless it is the larger or the smaller one of them."""
    if isinstance(node, ast.Call) and len(node.args) > 1 and _name(node.func) not in EXTREMES:
        node.args[0], node.args[1] = node.args[1], node.args[0]
        return node
    return None


def off_by_one(node: ast.AST) -> ast.AST | None:
    """The end of a range or slice moved by one."""
    if isinstance(node, ast.Call) and _name(node.func) == "range" and node.args:
        place = 1 if len(node.args) > 1 else 0
        node.args[place] = ast.BinOp(node.args[place], ast.Sub(), ast.Constant(1))
        return node
    if isinstance(node, ast.Slice) and (node.upper or node.lower) is not None:
        side = "upper" if node.upper is not None else "lower"
        setattr(node, side, ast.BinOp(getattr(node, side), ast.Add(), ast.Constant(1)))
        return node
    return None


def statement_dropped(node: ast.AST) -> ast.AST | None:
    """An assignment in place, a call or a guard left out."""
    guard = isinstance(node, ast.If) and not node.orelse
    call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    return ast.Pass() if guard or call or isinstance(node, ast.AugAssign) else None


OPERATORS: tuple[Operator, ...] = (
    comparison_flipped,
    comparison_strict,
    arithmetic,
    term_dropped,
    factor_dropped,
    constant_zero,
    constant_doubled,
    extremes,
    cap_removed,
    negation_dropped,
    connective,
    arguments_swapped,
    off_by_one,
    statement_dropped,
)


def _name(function: ast.expr) -> str:
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def mutants(module: str) -> Iterator[Mutant]:
    """Yield every mutant of a module, in the order of its nodes."""
    tree = ast.parse((HOME / module).read_text())
    seen: Counter[tuple[str, str, str]] = Counter()
    for path, function in _places(tree):
        node = _at(tree, path)[1]
        before = ast.unparse(node)
        for operator in OPERATORS:
            replaced = operator(copy.deepcopy(node))
            if replaced is None or ast.unparse(replaced) == before:
                continue
            change = function, _short(before), _short(ast.unparse(replaced))
            seen[change] += 1
            yield Mutant(
                module=module,
                function=function,
                operator=operator,
                path=tuple(path),
                line=getattr(node, "lineno", 0),
                before=change[1],
                after=change[2],
                number=seen[change],
            )


def _places(tree: ast.AST) -> Iterator[tuple[list[Step], str]]:
    """Paths to all nodes within functions, without signatures, decorators, docstrings and messages."""

    def walk(node: ast.AST, path: list[Step], function: str) -> Iterator[tuple[list[Step], str]]:
        for name, value in ast.iter_fields(node):
            if name in ("decorator_list", "args", "returns", "annotation", "type_params") and isinstance(
                node, ast.FunctionDef | ast.AnnAssign
            ):
                continue
            entries = enumerate(value) if isinstance(value, list) else [(None, value)]
            for index, child in entries:
                if not isinstance(child, ast.AST) or isinstance(
                    child, ast.Raise | ast.JoinedStr | ast.Assert
                ):
                    continue
                if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                    continue
                inner = child.name if isinstance(child, ast.FunctionDef | ast.ClassDef) else ""
                inside = f"{function}.{inner}".strip(".") if inner else function
                here = [*path, (name, index)]
                if inside and not inner:
                    yield here, inside
                yield from walk(child, here, inside)

    yield from walk(tree, [], "")


def _at(tree: ast.AST, path: Sequence[Step]) -> tuple[ast.AST, ast.AST]:
    parent = node = tree
    for name, index in path:
        parent = node
        value = getattr(node, name)
        node = value if index is None else value[index]
    return parent, node


def _put(parent: ast.AST, step: Step, node: ast.AST) -> None:
    name, index = step
    if index is None:
        setattr(parent, name, node)
    else:
        getattr(parent, name)[index] = node


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 100 else f"{line[:97]}..."


class Copy:
    """The packages in a folder of their own, where one module after the other is changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._seconds: dict[str, float] = {}
        for package in PACKAGES:
            shutil.copytree(HOME / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(HOME / "pyproject.toml", folder)

    def limit(self, tests: Sequence[str]) -> int:
        """Return the processor seconds after which a mutant is hung.

        Raises
        ------
        AssertionError
            If the tests fail on the code as it is.
        """
        for test in tests:
            if test not in self._seconds:
                passed, self._seconds[test] = self._tried((test,), MOST)
                assert passed, f"{test} fails on the code as it is"
        return int(LEAST + PATIENCE * sum(self._seconds[test] for test in tests))

    def survives(self, module: str, source: str, tests: Sequence[str]) -> bool:
        """Whether these tests pass with this source of a module."""
        limit = self.limit(tests)
        target = self.folder / module
        original = target.read_text()
        target.write_text(source)
        for cached in target.parent.glob(f"__pycache__/{target.stem}.*.pyc"):
            cached.unlink()
        try:
            return self._tried(tests, limit)[0]
        finally:
            target.write_text(original)
            for cached in target.parent.glob(f"__pycache__/{target.stem}.*.pyc"):
                cached.unlink()

    def _tried(self, tests: Sequence[str], limit: int) -> tuple[bool, float]:
        """Whether these tests pass in a child process, and its seconds of processor time."""
        child = os.fork()
        if child == 0:
            resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
            os._exit(self._run(tests))
        _, status, used = os.wait4(child, 0)
        return status == 0, used.ru_utime + used.ru_stime

    def _run(self, tests: Sequence[str]) -> int:
        """Run tests in this process, which is a child of its own."""
        import pytest

        nothing = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(nothing, stream)
        os.chdir(self.folder)
        sys.path[:] = [str(self.folder), *(path for path in sys.path if Path(path or ".").resolve() != HOME)]
        for name in [name for name in sys.modules if name.split(".")[0] in PACKAGES]:
            del sys.modules[name]
        options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", str(self.folder)]
        return int(pytest.main([*options, *tests]))


def preload() -> None:
    """Import in the parent what every child needs of other packages."""
    os.environ["NUMBA_DISABLE_JIT"] = "1"
    import hypothesis  # noqa: F401
    import numba  # noqa: F401
    import pytest  # noqa: F401
    import scipy.optimize  # noqa: F401
    import torch  # noqa: F401


def sample(everything: Sequence[Mutant], seed: int, count: int) -> list[Mutant]:
    """Return the `count` mutants whose hashes, of seed and text, are least; all if there are fewer."""

    def rank(mutant: Mutant) -> bytes:
        return sha256(f"{seed}:{mutant.text}".encode()).digest()

    return sorted(everything, key=rank)[:count]


def listed(everything: Sequence[Mutant], lines: Sequence[str]) -> list[Mutant]:
    """Return the mutants whose texts these lines are, with or without ``survived:`` before them.

    Raises
    ------
    ValueError
        If there is no such mutant.
    """
    texts = {line.removeprefix(SURVIVED).strip() for line in lines if line.strip()}
    unknown = texts - {mutant.text for mutant in everything}
    if unknown:
        raise ValueError(f"no mutant has the text {min(unknown)!r}; take the lines that a run has printed")
    return [mutant for mutant in everything if mutant.text in texts]


def say(line: str) -> None:
    """Write one line to the terminal."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _named() -> int:
    """Run the mutants of `NAMED`; 1 if one survives."""
    survived = 0
    with tempfile.TemporaryDirectory() as folder:
        copied = Copy(Path(folder))
        for module, before, after in NAMED:
            source = (HOME / module).read_text()
            assert source.count(before) == 1, f"{module} has {source.count(before)} times {before!r}"
            lives = copied.survives(module, source.replace(before, after), NAMED_TESTS)
            survived += lives
            say(f"{'survived' if lives else 'killed'}: {module}: {before} -> {after}")
    return 1 if survived else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the mutants asked for and print what became of them; 1 if too many survive."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("modules", nargs="*", metavar="MODULE", default=list(TESTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=150)
    parser.add_argument("--named", action="store_true", help="those of `NAMED` instead")
    parser.add_argument("--texts", type=Path, metavar="FILE", help="only the mutants named there, one a line")
    given = parser.parse_args(arguments)
    unknown = [module for module in given.modules if module not in TESTS]
    if unknown:
        parser.error(f"no tests are known for {', '.join(unknown)}; use one of {', '.join(TESTS)}")
    preload()
    if given.named:
        return _named()
    counts: Counter[str] = Counter()
    everything = [mutant for module in given.modules for mutant in mutants(module)]
    texts = {mutant.text for mutant in everything}
    stale = [text for text in EQUIVALENT if text.partition(":")[0] in given.modules and text not in texts]
    if stale:
        parser.error(f"no mutant is {stale[0]!r} any more; take it out of EQUIVALENT, or say it as it is now")
    if given.texts is None:
        drawn = sample(everything, given.seed, given.count)
    else:
        drawn = listed(everything, given.texts.read_text().splitlines())
    with tempfile.TemporaryDirectory() as folder:
        copied = Copy(Path(folder))
        for mutant in drawn:
            if mutant.equivalent:
                result = "equivalent"
            else:
                result = (
                    "survived"
                    if copied.survives(mutant.module, mutant.source(), TESTS[mutant.module])
                    else "killed"
                )
            counts[result] += 1
            if counts.total() % 10 == 0:
                say(f"{counts.total()} done")
            if result == "survived":
                say(f"{SURVIVED}{mutant.text}")
    meaningful = counts["killed"] + counts["survived"]
    share = counts["killed"] / max(meaningful, 1)
    parts = ", ".join(f"{n} {result}" for result, n in sorted(counts.items()))
    say(f"{counts.total()} mutants: {parts}")
    say(f"killed {share:.1%} of the {meaningful} that mean something")
    return 0 if share >= WANTED else 1


if __name__ == "__main__":
    sys.exit(main())

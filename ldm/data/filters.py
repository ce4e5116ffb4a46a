"""Filters on metadata: an expression about the columns of a sample, which can run no code.

Allowed are names of columns, ``json["any key"]``, numbers, texts, ``and``, ``or``, ``not``, comparisons (also
chained ones), ``in``, ``+ - * /``, ``min``, ``max``, ``abs``, ``len`` and ``lower``.
"""

from __future__ import annotations

import ast
import operator
import sys
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

import numpy as np

from ldm.data.metadata import Kind
from ldm.data.rows import is_missing

_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_FUNCTIONS: dict[str, tuple[Kind, Kind, int]] = {
    "min": (float, float, 2),
    "max": (float, float, 2),
    "abs": (float, float, 1),
    "len": (str, float, 1),
    "lower": (str, str, 1),
}
"""Name to the kind of its arguments, that of its value, and how many arguments it needs at least."""
_ALLOWED = (
    "names of fields, numbers, texts, and, or, not, comparisons, in (...), + - * /, min, max, abs, len, lower"
)


class Filter:
    """Keeps the samples for which an expression is true; those that lack one of its columns are left out.

    As a ``Grouping`` it has one group. A name is text where it is compared with text, and a number elsewhere;
    a number that stands alone is true if it is not 0.

    Args:
        text: The expression, e.g. ``min(width, height) >= 256 and aesthetic > 5.5 and not watermark``.
        option: What names it, for messages.

    Raises:
        ValueError: If it is no such expression.
    """

    num_groups = 1

    def __init__(self, text: str, option: str = "data.filter") -> None:
        self.option = option
        self.columns: dict[str, Kind] = {}
        try:
            self.tree = ast.parse(text.strip(), mode="eval").body
            self._check(self.tree, float)
            self.identity = ast.unparse(self.tree)
            """The expression, written in one way."""
        except (SyntaxError, RecursionError, MemoryError) as error:
            what = getattr(error, "msg", error)
            raise ValueError(
                f"{option}: '{text:.100}' is no expression ({what}), expected {_ALLOWED}"
            ) from None
        if not self.columns:
            raise ValueError(f"{option}: '{text:.100}' names no field, expected one, as in width >= 256")

    def groups(self, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return 0 for each of N samples that is kept, -1 for others: (N,) int."""
        missing = reduce(np.logical_or, (is_missing(columns[name]) for name in self.columns))
        present = {name: columns[name][~missing] for name in self.columns}
        kept = np.zeros(len(missing), dtype=bool)
        with np.errstate(all="ignore"):
            kept[~missing] = _truth(_value(self.tree, present))
        return np.where(kept, 0, -1)

    def _refuse(self, node: ast.AST, expected: str = _ALLOWED) -> ValueError:
        return ValueError(f"{self.option}: got '{ast.unparse(node):.60}', expected {expected}")

    def _check(self, node: ast.expr, kind: Kind) -> None:
        """Check that a part gives a value of a kind, and note the columns that it reads."""
        given: Kind = float
        inner: list[tuple[ast.expr, Kind]] = []
        match node:
            case ast.BoolOp(values=parts):
                inner = [(part, float) for part in parts]
            case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.UAdd(), operand=part):
                inner = [(part, float)]
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
                inner = [(left, float), (right, float)]
            case ast.Compare():
                inner = self._compared(node)
            case ast.Call(func=ast.Name(id=name), args=parts, keywords=[]) if name in _FUNCTIONS:
                taken, given, least = _FUNCTIONS[name]
                if len(parts) < least or (least == 1 and len(parts) > 1):
                    raise self._refuse(
                        node, f"{name} of {'two or more values' if least > 1 else 'one value'}"
                    )
                inner = [(part, taken) for part in parts]
            case ast.Constant(value=str()):
                given = str
            case ast.Constant(value=bool() | int() | float() as value) if abs(value) <= sys.float_info.max:
                pass
            case _ if (column := _column(node)) is not None:
                given = self.columns.setdefault(column, kind)
                if given is not kind:
                    raise self._refuse(node, "a field that is used as a number or as text, not as both")
            case _:
                raise self._refuse(node)
        if given is not kind:
            raise self._refuse(node, "a number here" if kind is float else "text here")
        for part, wanted in inner:
            self._check(part, wanted)

    def _compared(self, node: ast.Compare) -> list[tuple[ast.expr, Kind]]:
        """Return the parts of a comparison and their kind: text if one of them is."""
        parts, is_text = [node.left], False
        for op, right in zip(node.ops, node.comparators, strict=True):
            if type(op) in _COMPARISONS:
                parts.append(right)
            elif not isinstance(op, ast.In | ast.NotIn):
                raise self._refuse(node)
            elif isinstance(right, ast.Tuple | ast.List | ast.Set):
                if not right.elts or not all(isinstance(each, ast.Constant) for each in right.elts):
                    raise self._refuse(right, "numbers or texts to choose from")
                parts += right.elts
            else:  # a text in another one
                parts.append(right)
                is_text = True
        kind: Kind = str if is_text or any(map(self._is_text, parts)) else float
        return [(part, kind) for part in parts]

    def _is_text(self, node: ast.expr) -> bool:
        match node:
            case ast.Constant(value=value):
                return isinstance(value, str)
            case ast.Call(func=ast.Name(id=name)):
                return _FUNCTIONS.get(name, (float, float))[1] is str
        return self.columns.get(_column(node) or "") is str


def _column(node: ast.expr) -> str | None:
    """Return the column that ``name`` or ``json["name"]`` names."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Subscript(value=ast.Name(id="json"), slice=ast.Constant(value=str() as name)):
            return name
    return None


def _truth(value: Any) -> np.ndarray:
    """Return what is neither 0 nor NaN, such as 0 / 0."""
    numbers = np.asarray(value, dtype=np.float64)
    return (numbers != 0) & ~np.isnan(numbers)


def _value(node: ast.expr, columns: Mapping[str, np.ndarray]) -> Any:
    """Compute a checked expression over N samples: (N,) numbers or texts, or one where it is constant."""
    match node:
        case ast.BoolOp(op=op, values=parts):
            join = np.logical_and if isinstance(op, ast.And) else np.logical_or
            return reduce(join, (_truth(_value(part, columns)) for part in parts))
        case ast.UnaryOp(op=op, operand=part):
            inner = _value(part, columns)
            if isinstance(op, ast.Not):
                return ~_truth(inner)
            return -np.asarray(inner, np.float64) if isinstance(op, ast.USub) else inner
        case ast.BinOp(left=left, op=op, right=right):
            sides = [np.asarray(_value(part, columns), np.float64) for part in (left, right)]
            return _ARITHMETIC[type(op)](*sides)
        case ast.Compare(left=left, ops=ops, comparators=parts):
            values = [_value(part, columns) for part in (left, *parts)]
            pairs = zip(ops, values[:-1], values[1:], strict=True)
            return reduce(np.logical_and, (_compare(op, one, two) for op, one, two in pairs))
        case ast.Call(func=ast.Name(id=name), args=parts):
            return _call(name, [_value(part, columns) for part in parts])
        case ast.Tuple(elts=parts) | ast.List(elts=parts) | ast.Set(elts=parts):
            return {_value(part, columns) for part in parts}
        case ast.Constant(value=value):
            return value if isinstance(value, str) else float(value)  # type: ignore[arg-type]
    return columns[_column(node) or ""]


def _compare(op: ast.cmpop, one: Any, two: Any) -> np.ndarray:
    if type(op) in _COMPARISONS:
        return np.asarray(_COMPARISONS[type(op)](np.asarray(one), np.asarray(two)), dtype=bool)
    found = np.vectorize(operator.contains, otypes=[bool], excluded=[0] if isinstance(two, set) else [])(
        two, one
    )
    return found if isinstance(op, ast.In) else ~found


def _call(name: str, values: list[Any]) -> Any:
    if name in ("min", "max"):
        return reduce(np.minimum if name == "min" else np.maximum, values)
    if name == "abs":
        return np.abs(np.asarray(values[0], np.float64))
    function, kind = (len, float) if name == "len" else (str.lower, object)
    return np.vectorize(function, otypes=[kind])(values[0])

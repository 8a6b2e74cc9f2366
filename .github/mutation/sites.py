"""The places of a file that a mutation changes, and what stands there afterwards."""

import ast
import copy

SWAPPED = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}


NOT_SWAPPED = {"isinstance", "issubclass", "getattr", "hasattr", "cast"}


def sites(node):
    """Yield (kind, place, text): a mutation of that kind puts the text in that node's place.

    Docstrings, annotations, imports, decorators and the texts of errors are left alone.
    """
    if isinstance(node, ast.Raise):
        yield "statement", node, "pass"
        return
    if isinstance(node, ast.Import | ast.ImportFrom | ast.JoinedStr) or _says_nothing(node):
        return
    for kind, place, new in _mutations(node):
        yield kind, place, new if isinstance(new, str) else f"({ast.unparse(new)})"
    for name, value in ast.iter_fields(node):
        if name not in ("annotation", "returns", "decorator_list"):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from sites(child)


def _says_nothing(node):
    """Return whether a docstring stands here, or what only a type checker reads."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant)
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def _mutations(node):
    match node:
        case ast.BinOp(op=op) if type(op) in SWAPPED:
            yield "arithmetic", node, _with(node, op=SWAPPED[type(op)]())
        case ast.Compare(ops=[op]) if type(op) in SWAPPED:
            yield "comparison", node, _with(node, ops=[SWAPPED[type(op)]()])
        case ast.BoolOp(op=op, values=values):
            yield "condition", node, _with(node, op=SWAPPED[type(op)]())
            for value in values:
                rest = [each for each in values if each is not value]
                yield "condition", node, _with(node, values=rest) if rest[1:] else rest[0]
        case ast.If(test=test) | ast.IfExp(test=test) | ast.comprehension(ifs=[test]):
            yield "condition", test, "True"
            yield "condition", test, "False"
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield "sign or not", node, node.operand
        case ast.Constant(value=bool(value)):
            yield "constant", node, str(not value)
        case ast.Constant(value=int(value) | float(value)):
            changed = value + 1 if isinstance(value, int) else 1.5 * value + 1e-3
            yield "constant", node, str(changed)
        case ast.Call(args=args, keywords=keywords):
            for keyword in keywords:
                rest = [each for each in keywords if each is not keyword]
                yield "keyword", node, _with(node, keywords=rest)
            plain = not any(isinstance(each, ast.Starred) for each in args)
            names = [ast.unparse(each) for each in (node.func, *args[-2:])]
            if plain and names[0] not in NOT_SWAPPED and len(set(names[1:])) == 2:
                yield "order", node, _with(node, args=[*args[:-2], args[-1], args[-2]])
        case ast.Expr() | ast.AugAssign():
            yield "statement", node, "pass"
        case ast.Assign(targets=[ast.Name(id=name)], value=value):
            if any(isinstance(each, ast.Name) and each.id == name for each in ast.walk(value)):
                yield "statement", node, "pass"


def _with(node, **changed):
    new = copy.copy(node)
    for name, value in changed.items():
        setattr(new, name, value)
    return new

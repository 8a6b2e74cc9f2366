"""The choice of the layers of a net that a rule applies to."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from jaxprop.combinators.shared import Shared
from jaxprop.core.checks import given, require
from jaxprop.core.combinator import Combinator, map_children
from jaxprop.core.layer import Layer
from jaxprop.core.where import Path, Where, check_where, is_meant
from jaxprop.traced.part import PartLayer
from jaxprop.traced.ruled import Rule


def with_rule(net: Layer, rule: Rule, where: Where) -> Layer:
    """Return the net with ``rule(layer)`` in place of every selected layer.

    Args:
        net: the network, or the part of a function that ``jp.function(fn, rules=)`` hands in, which
            any ``where`` selects.
        rule: a function of a layer.
        where: which layers.

    Raises:
        TypeError: for a net that is not a layer, or a ``where`` that cannot select layers.
        ValueError: if no layer is selected.
    """
    check_where(where)
    return with_rules(net, {where: rule})


def with_rules(
    net: Layer, rules: Mapping[Where, Rule], others: Callable[[Layer], Layer] = lambda layer: layer
) -> Layer:
    """Return the net with ``rule(layer)`` for every layer, by the first rule that selects it.

    Args:
        net: as in ``with_rule``.
        rules: a rule for each ``where``.
        others: the rule for all other layers, which by default stay as they are.

    Raises:
        TypeError: as in ``with_rule``.
        ValueError: for a ``where`` that selects no layer.
    """
    require(net, Layer, "rules: net")
    if not isinstance(rules, Mapping):
        raise TypeError(f"rules are a dict of a rule for each where, not {given(rules)}")
    for where, rule in rules.items():
        check_where(where)
        if not callable(rule):
            raise TypeError(f"rules: a rule is a function of a layer, not {given(rule)}")
    found: set[Where] = set()

    def of_layer(layer: Layer, path: Path) -> Layer:
        meant = [where for where in rules if _is_meant(layer, path, where)]
        found.update(meant)
        return rules[meant[0]](layer) if meant else others(layer)

    changed = _mapped(net, of_layer, ())
    for where in rules:
        if where not in found:
            raise ValueError(f"where={where!r} matches no layer of {net}")
    return changed


def _is_meant(layer: Layer, path: Path, where: Where) -> bool:
    return isinstance(layer, PartLayer) or is_meant(layer, path, where)


def _mapped(layer: Layer, f: Callable[[Layer, Path], Layer], path: Path) -> Layer:
    if not isinstance(layer, Combinator | Shared):
        return f(layer, path)
    children = list(layer.children())

    def of_child(inner: Layer) -> Layer:
        at = next(index for index, child in enumerate(children) if child.layer is inner)
        name = children.pop(at).name
        here = path if name is None or name is ... else (*path, name)
        return _mapped(inner, f, here)

    return map_children(layer, of_child)

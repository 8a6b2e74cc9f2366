"""Layers made of layers declare them once; side inputs, order and names follow from that."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from table import TABLE, Around, Row, at, first_of_their_kind, normal, relative_error, row_id

import jaxprop as jp
from jaxprop.core.combinator import map_layers, runs, stack_depths
from jaxprop.core.step import Step
from jaxprop.core.tree import learned

LOSS = jp.HalfSquaredError()


class Times(jp.Layer):
    """y = x times a static factor, with a name."""

    factor: float
    name: str = ""

    def forward(self, params, x):
        return x * self.factor, jnp.zeros((len(x), 0))

    def backward(self, params, residuals, ct):
        return (), ct * self.factor


class Two(jp.Combinator):
    """A user's combinator, y = second(first(x)), with params in a dict and default names."""

    first: jp.Layer
    second: jp.Layer

    def children(self):
        return (jp.Child(self.first, "a"), jp.Child(self.second, "b"))

    def init(self, key, x):
        a = self.first.init(key, x)
        y, _ = jax.eval_shape(self.first.forward, a, x)
        return {"b": self.second.init(jax.random.fold_in(key, 1), y), "a": a}

    def forward(self, params, x):
        h, first = self.first.forward(params["a"], x)
        y, second = self.second.forward(params["b"], h)
        return y, (first, second)

    def walk(self, place, residuals, ct, visit):
        b, ct = self.second.walk(place["b"], residuals[1], ct, visit)
        a, d_x = self.first.walk(place["a"], residuals[0], ct, visit)
        return {"a": a, "b": b}, d_x


class Pair(jp.Combinator):
    """The same with its params in a tuple, which is the default for children."""

    first: jp.Layer
    second: jp.Layer

    def init(self, key, x):
        params = Two(self.first, self.second).init(key, x)
        return params["a"], params["b"]

    def forward(self, params, x):
        h, first = self.first.forward(params[0], x)
        y, second = self.second.forward(params[1], h)
        return y, (first, second)

    def walk(self, place, residuals, ct, visit):
        second, ct = self.second.walk(place[1], residuals[1], ct, visit)
        first, d_x = self.first.walk(place[0], residuals[0], ct, visit)
        return (first, second), d_x


A, B = jp.chain(jp.Tanh(), jp.Dense(3)), Times(0.5)


def turns(place, layers, count):
    return [
        f"{place}.{i}[{t}]" if layers > 1 else f"{place}[{t}]"
        for t in range(count)
        for i in range(layers)
    ]


ORDERS = {
    "branch, more below": (
        jp.branch(jp.repeat(A, 2), jp.repeat(B, 4)),
        turns(0, 2, 2) + turns(1, 1, 4),
    ),
    "branch, more above": (
        jp.branch(jp.repeat(A, 4), jp.repeat(B, 2)),
        turns(0, 2, 4) + turns(1, 1, 2),
    ),
    "a user's, by name": (
        Two(jp.repeat(A, 2), jp.repeat(B, 3)),
        turns("a", 2, 2) + turns("b", 1, 3),
    ),
    "a user's, by place": (
        jp.chain(jp.Tanh(), Pair(jp.repeat(B, 3), jp.repeat(A, 2))),
        ["0", *turns("1.0", 1, 3), *turns("1.1", 2, 2)],
    ),
    "around one another": (
        jp.repeat(jp.branch(jp.repeat(B, 2), jp.chain(B, jp.repeat(B, 3))), 2),
        [
            name
            for i in range(2)
            for name in (
                *(f"0[{i}, {j}]" for j in range(2)),
                f"1.0[{i}]",
                *(f"1.1[{i}, {j}]" for j in range(3)),
            )
        ],
    ),
    "one layer, repeated once": (jp.repeat(B, 1), ["[0]"]),
}


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ORDERS)
def test_layers_are_explained_in_the_order_in_which_they_run(name):
    net, expected = ORDERS[name]
    x = jnp.asarray(normal(2, 3))
    params = net.init(jax.random.key(0), x)
    terms = jp.explain(net, LOSS, params, x, jnp.zeros_like(x))
    assert [place for place, _ in terms.runs()] == expected
    assert len(str(terms).splitlines()) > len(expected)


def test_a_nan_is_blamed_on_the_layer_and_the_turn_that_made_it():
    x = jnp.full((2, 3), 1e250)
    for net, where in (
        (jp.branch(jp.repeat(Times(1.0), 2), jp.repeat(Times(1e20), 4)), "1[2]"),
        (jp.branch(jp.repeat(Times(1e20), 4), jp.repeat(Times(1.0), 2)), "0[2]"),
        (Two(jp.repeat(Times(1e10), 2), jp.repeat(Times(1e20), 3)), "b[1]"),
    ):
        found = jp.find_nonfinite(net, LOSS, net.init(jax.random.key(0), x), x, x)
        assert (found.phase, found.layer, found.array) == ("forward", where, "y")


def test_a_layer_that_no_combinator_declares_is_named():
    class Undeclared(jp.Combinator):
        first: jp.Layer
        second: jp.Layer
        init, forward, walk = Pair.init, Pair.forward, Pair.walk

        def children(self):
            return (jp.Child(self.first, 0),)

    x = jnp.ones((2, 3))
    net = Undeclared(B, B)
    terms = jp.explain(net, LOSS, net.init(jax.random.key(0), x), x, x)
    with pytest.raises(ValueError, match=r"came to layers at 1, which the children\(\)"):
        terms.runs()


MADE_OF_LAYERS = [row for row in TABLE if isinstance(row.layer, jp.Combinator)]
rows = pytest.mark.parametrize("row", MADE_OF_LAYERS, ids=row_id)


@rows
def test_runs_are_what_the_way_forward_comes_to(row):
    """``runs`` has the layers in the order in which forward calls them; the walk reverses it."""
    met = []

    class Noted(jp.Wrapper):
        def forward(self, params, x):
            met.append(self.layer)
            return self.layer.forward(params, x)

        def backward(self, params, residuals, ct):
            return self.layer.backward(params, residuals, ct)

    params, x = at(row)
    jax.eval_shape(map_layers(row.layer, Noted).forward, params, x)
    order = [run.layer for run in runs(row.layer) if not any(run.turn)]
    assert [layer for i, layer in enumerate(met) if layer is not met[i - 1] or i == 0] == [
        layer for i, layer in enumerate(order) if layer is not order[i - 1] or i == 0
    ]


@pytest.mark.parametrize("row", first_of_their_kind(MADE_OF_LAYERS), ids=row_id)
def test_what_follows_from_the_children(row):
    params, x = at(row)
    depths = stack_depths(row.layer, params)
    assert jax.tree.structure(depths) == jax.tree.structure(learned(params))
    names = {".".join(map(str, run.names)) for run in runs(row.layer)}
    terms = jax.eval_shape(
        lambda params, x: jp.explain(row.layer, LOSS, params, x, row.layer.forward(params, x)[0]),
        params,
        x,
    )
    assert names == set(terms.layers)
    bound = row.layer.bind(params, key=jax.random.key(0), mask=None)
    assert jax.tree.structure(learned(bound)) == jax.tree.structure(learned(params))


@pytest.mark.full
def test_side_inputs_reach_every_layer():
    block = jp.skip(jp.chain(jp.Dense(6), jp.Attention(1), jp.Dense(2), jp.Dropout(0.5)))
    net = Two(
        jp.chain(jp.Dropout(0.5), jp.repeat(jp.repeat(block, 2), 3)),
        jp.branch(
            jp.recompute(jp.Dropout(0.5)), jp.shared(jp.chain(jp.Dense(2), jp.Dropout(0.5)), 2)
        ),
    )
    x = jnp.asarray(normal(4, 5, 2))
    mask = jnp.arange(5)[None] < jnp.array([5, 3, 2, 1])[:, None]
    params = net.init(jax.random.key(0), x)
    bound = net.bind(params, key=jax.random.key(1), mask=mask)
    keys = [
        node.value.reshape(-1)
        for node in jax.tree.leaves(bound, is_leaf=lambda node: isinstance(node, jp.Key))
        if isinstance(node, jp.Key)
    ]
    assert [len(each) for each in keys] == [1, 6, 1, 1]
    every = np.concatenate([np.asarray(jax.random.key_data(each)) for each in keys])
    assert len(np.unique(every, axis=0)) == 9
    masks = jax.tree.leaves(bound, is_leaf=lambda node: isinstance(node, jp.Mask))
    (mask_of_stack,) = [node.value for node in masks if isinstance(node, jp.Mask)]
    assert mask_of_stack.shape == (3, 2, 4, 5)
    args = params, x, jnp.zeros_like(x)
    given = {"key": jax.random.key(1), "mask": mask}
    got = jp.value_and_grad(net, LOSS)(*args, **given)
    assert relative_error(got, jp.autodiff(net, LOSS)(*args, **given)) <= 1e-12
    assert relative_error(got, jp.value_and_grad(net, LOSS)(bound, *args[1:])) == 0
    by_jax = jax.value_and_grad(jp.loss_fn(net, LOSS))(*args, **given)
    assert relative_error(got, by_jax) <= 1e-12


def test_a_side_input_that_cannot_be_placed_is_refused():
    x = jnp.asarray(normal(4, 3))
    plain = Around(jp.Dense(2))
    params = plain.init(jax.random.key(0), x)
    assert plain.bind(params, key=jax.random.key(0)) == params
    net = jp.chain(Around(jp.chain(jp.Dense(2), jp.Dropout(0.5))))
    params = net.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=r"takes a key, but where its params stand is not known"):
        net.bind(params, key=jax.random.key(0))
    for wrong in (0, jax.random.PRNGKey(0), jnp.zeros(2)):
        with pytest.raises(TypeError, match=r"key is a key of jax\.random\.key, not"):
            net.bind(params, key=wrong)
    missing = Two(jp.Dense(2), jp.Dense(2))
    with pytest.raises(ValueError, match=r"where Dense\(2\) has no place 'b'"):
        missing.forward({"a": jp.Dense(2).init(jax.random.key(0), x)}, x)


def test_init_goes_through_nested_chains_once():
    """A chain in a chain in a chain: every layer is traced once, whatever the depth."""
    counted = []

    class Counts(jp.Layer):
        def forward(self, params, x):
            counted.append(1)
            return x, x

        def backward(self, params, x, ct):
            return (), ct

    net = Counts()
    for _ in range(60):
        net = jp.chain(net, jp.skip(jp.chain(Counts())))
    net.init(jax.random.key(0), jnp.ones((2, 3)))
    assert len(counted) == 61


def test_params_are_replaced_in_named_tuples_and_dataclasses():
    params = jp.AffineParams(jnp.ones(2), None)
    child = jp.Child(jp.Tanh(), "b")
    assert child.put(params, 3) == jp.AffineParams(params.w, 3)
    assert child.of(params) is None

    @dataclasses.dataclass(frozen=True)
    class Held:
        a: int
        b: int

    assert child.put(Held(1, 2), 5) == Held(1, 5)
    assert isinstance(Step._fields, tuple)


class Stack(jp.Combinator):
    """A user's own repeat, with its params in a dict."""

    block: jp.Layer
    times: int

    def children(self):
        return (jp.Child(self.block, "block", self.times),)

    def init(self, key, x):
        keys = jax.random.split(key, self.times)
        return {"block": jax.vmap(lambda key: self.block.init(key, x))(keys)}

    def forward(self, params, x):
        return jax.lax.scan(lambda x, p: self.block.forward(p, x), x, params["block"])

    def walk(self, place, residuals, ct, visit):
        def back(ct, layer):
            visited, d_x = self.block.walk(*layer, ct, visit)
            return d_x, visited

        d_x, visited = jax.lax.scan(back, ct, (place["block"], residuals), reverse=True)
        return {"block": jp.over_layers(visited)}, d_x


def test_a_user_s_own_stack_is_a_repeat():
    block = jp.chain(jp.Dense(3), jp.Tanh())
    mine, ours = (jp.chain(make(block, 4), jp.Dense(2)) for make in (Stack, jp.repeat))
    params, x = at(Row(ours, normal(4, 3)))
    args = x, normal(4, 2)
    asked = {
        "norms": jp.SqNorms(),
        "gram": jp.Gram(),
        "noise": jp.NoiseScale(),
        "clipped": jp.Clipped(0.1),
        "twice": jp.Clipped(0.1, two_pass=True),
        "by layer": jp.Clipped(0.1, per_layer=True),
        "diagonal": jp.DiagGGN(),
        "kfac": jp.KroneckerFactors(),
        "root": jp.GGNRoot(),
    }
    got = jax.jit(jp.quantities(mine, LOSS, **asked))(({"block": params[0]}, params[1]), *args)
    expected = jax.jit(jp.quantities(ours, LOSS, **asked))(params, *args)
    for name in asked:
        pair = (jax.tree.leaves(each[name]) for each in (got, expected))
        assert relative_error(*pair) <= 1e-12, name


def test_a_stack_of_another_size_is_refused():
    net = Stack(jp.Dense(3), 4)
    params, x = at(Row(Stack(jp.Dense(3), 5), normal(4, 3)))
    with pytest.raises(ValueError, match=r"has shape \(5, 3, 3\), but axis 0 is the layer, and "):
        net.forward(params, x)


@pytest.mark.parametrize("kind", [list, tuple, jp.AffineParams._make])
@pytest.mark.parametrize("last", [1, -1])
def test_a_child_is_put_where_it_was(kind, last):
    params = kind([1, 2])
    new = jp.Child(jp.Tanh(), last).put(params, 3)
    assert type(new) is type(params)
    assert new == kind([1, 3])


def test_children_in_a_tuple_of_one():
    net = jp.chain(jp.chain(jp.Dropout(0.5)), jp.Dense(2))
    assert net.children()[0].layer.children() == (jp.Child(jp.Dropout(0.5), 0),)

    class Several(jp.Combinator):
        layers: tuple

        def forward(self, params, x):
            return x, ()

        def walk(self, place, residuals, ct, visit):
            return place, ct

    assert Several((jp.Tanh(),)).children() == (jp.Child(jp.Tanh(), 0),)
    assert Several((jp.Tanh(), jp.Relu())).children()[1] == jp.Child(jp.Relu(), 1)


class Somewhere(jp.Combinator):
    """A user's combinator that does not say where its layer's params are."""

    layer: jp.Layer

    def children(self):
        return (jp.Child(self.layer, ...),)

    def forward(self, params, x):
        return self.layer.forward(params["here"], x)

    def walk(self, place, residuals, ct, visit):
        visited, d_x = self.layer.walk(place["here"], residuals, ct, visit)
        return {"here": visited}, d_x


def test_a_place_that_is_not_known_is_refused():
    params, x = at(Row(jp.Dense(3), normal(2, 3)))
    with pytest.raises(ValueError, match=r"does not say where the params of Dense\(3\) stand"):
        Somewhere(jp.Dense(3)).forward({"here": params}, x)


@pytest.mark.parametrize(
    "layer",
    [
        jp.Conv(4, window=(3,)),
        jp.MaxPool((2,)),
        jp.AvgPool((2,)),
        jp.Pad(((1, 1),), mode="edge"),
        jp.GroupNorm(2),
        jp.BatchNorm(),
        jp.Flatten(),
    ],
    ids=str,
)
def test_a_layer_that_mixes_positions_refuses_a_mask(layer):
    net = jp.chain(jp.Dense(12), jp.Attention(2, causal=False), layer)
    params = jax.eval_shape(net.init, jax.random.key(0), jnp.ones((1, 4, 3)))
    with pytest.raises(ValueError, match="mixes positions and takes no mask"):
        net.bind(params, mask=jnp.ones((1, 4), bool))
    if isinstance(layer, jp.BatchNorm):
        jp.inference_mode(net).bind(params, mask=jnp.ones((1, 4), bool))


def test_a_mask_that_nobody_takes_is_refused():
    net = jp.chain(jp.Dense(3), jp.Tanh())
    with pytest.raises(ValueError, match="no layer takes a mask"):
        net.bind(((), ()), mask=jnp.ones((1, 4), bool))


@pytest.mark.full
def test_the_mean_over_real_positions():
    net = jp.chain(jp.Dense(12), jp.Attention(2, causal=False), jp.GlobalAvgPool(), jp.Dense(2))
    params, x = at(Row(net, normal(2, 5, 4)))
    target, mask = normal(2, 2), jnp.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool)
    f = jax.jit(jp.value_and_grad(net, LOSS))
    got = f(params, x, target, mask=mask)
    other = f(params, jnp.where(mask[..., None], x, 9.0), target, mask=mask)
    assert relative_error(got[0], other[0]) <= 1e-12
    assert relative_error(got, jp.autodiff(net, LOSS)(params, x, target, mask=mask)) <= 1e-12
    norms = jp.per_example_sq_norms(net, LOSS)(params, x, target, mask=mask)
    alone = jp.per_example_sq_norms(net, LOSS)(params, x[:1, :3], target[:1])
    assert relative_error(norms[:1], alone) <= 1e-12
    none = net.forward(net.bind(params, mask=jnp.zeros((2, 5), bool)), x)[0]
    assert np.isfinite(none).all()

"""``jp.function`` on models written in Flax, Linen and NNX, without changes."""

import functools

import jax
import jax.numpy as jnp
import pytest
from functions import drawn, hold, hold_curvature, hold_leaves, integers, normal, own_shares
from table import relative_error

import jaxprop as jp

nn = pytest.importorskip("flax.linen")
nnx = pytest.importorskip("flax.nnx")
pytestmark = pytest.mark.usefixtures("standard_promotion")

VOCAB, WIDTH, HEADS, LENGTH = 7, 8, 2, 4
# Positions and biases of heads are added to x; a scan stacks the biases and scales of its layers.
ADDED = r"positions|(query|key|value)/bias|scale$|bias$"


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        for features in (6, 5):
            x = nn.gelu(nn.Dense(features)(x))
        return nn.Dense(3)(x)


class Cnn(nn.Module):
    """Strided, grouped, dilated and transposed convolutions, and a GroupNorm between them."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), strides=(2, 2))(x))
        x = nn.GroupNorm(num_groups=2)(x)
        x = nn.tanh(nn.Conv(6, (3, 3), feature_group_count=2, padding="VALID")(x))
        x = nn.tanh(nn.Conv(4, (2, 2), kernel_dilation=2, use_bias=False)(x))
        x = nn.silu(nn.ConvTranspose(3, (3, 3), strides=(2, 2))(x))
        x = nn.avg_pool(x, (2, 2), (2, 2))
        return nn.Dense(3)(x.reshape(len(x), -1))


class Block(nn.Module):
    causal: bool = True

    @nn.compact
    def __call__(self, x):
        mask = nn.make_causal_mask(x[..., 0]) if self.causal else None
        h = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(HEADS)(h, h, mask=mask)
        h = nn.gelu(nn.Dense(2 * WIDTH)(nn.LayerNorm()(x)))
        return x + nn.Dense(WIDTH)(h)


class ScannedBlock(nn.Module):
    block: type = Block

    @nn.compact
    def __call__(self, x, _):
        return self.block()(x), None


class Gpt(nn.Module):
    scan: bool = False
    remat: bool = False
    tie: bool = False

    @nn.compact
    def __call__(self, ids):
        table = nn.Embed(VOCAB, WIDTH)
        shape = (LENGTH, WIDTH)
        positions = self.param("positions", nn.initializers.normal(0.02), shape)
        x = table(ids) + positions[None]
        block = nn.remat(Block) if self.remat else Block
        if self.scan:
            layers = nn.scan(
                ScannedBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
            )
            x, _ = layers(block)(x, None)
        else:
            for _ in range(2):
                x = block()(x)
        x = nn.LayerNorm()(x)
        return table.attend(x) if self.tie else nn.Dense(VOCAB)(x)


class Vit(nn.Module):
    @nn.compact
    def __call__(self, images):
        x = nn.Conv(WIDTH, (2, 2), strides=(2, 2))(images)
        x = x.reshape(len(x), -1, WIDTH)
        token = self.param("token", nn.initializers.zeros, (1, 1, WIDTH))
        x = jnp.concatenate([jnp.tile(token, (len(x), 1, 1)), x], axis=1)
        x = x + self.param("positions", nn.initializers.normal(0.02), (1, x.shape[1], WIDTH))
        return nn.Dense(3)(nn.LayerNorm()(Block(causal=False)(x))[:, 0])


class Recurrent(nn.Module):
    cell: type

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.RNN(self.cell(4, param_dtype=jnp.float64))(x)[:, -1])


def params_of(model, x, seed=0):
    return drawn(jax.eval_shape(model.init, jax.random.key(0), x), seed)


def images():
    return normal(2, 8, 8, 4)


def tokens():
    return integers(VOCAB, 3, LENGTH), integers(VOCAB, 3, LENGTH, seed=1)


def test_a_linen_mlp():
    x, target = normal(5, 4), integers(3, 5)
    model = Mlp()
    hold(
        model.apply,
        params_of(model, x),
        x,
        target,
        jp.CrossEntropy(),
        moments=True,
        diagonal=True,
    )


def test_a_linen_cnn():
    hold(Cnn().apply, params_of(Cnn(), images()), images(), integers(3, 2), jp.CrossEntropy())


GPTS = {
    "unrolled": Gpt(),
    "tied": Gpt(tie=True),
    "remat": Gpt(remat=True),
    "scan": Gpt(scan=True),
    "scan of remat, tied": Gpt(scan=True, remat=True, tie=True),
}


@pytest.mark.full
@pytest.mark.parametrize("name", GPTS)
def test_a_linen_gpt(name):
    model, (ids, target) = GPTS[name], tokens()
    params = params_of(model, ids)
    hold(model.apply, params, ids, target, jp.CrossEntropy(), owned=ADDED, zero="key/bias")


@pytest.mark.few(1)
@pytest.mark.parametrize("name", GPTS)
def test_what_of_a_linen_gpt_has_own_shares(name):
    """Unrolled, positions and biases of heads; with scan, stacks of vectors too."""
    model, (ids, _) = GPTS[name], tokens()
    owned = own_shares(jp.function(model.apply), params_of(model, ids), ids)
    kinds = {path.rsplit("/", 2)[-2] + "/" + path.rsplit("/", 2)[-1] for path in owned}
    vectors = {f"{layer}/bias" for layer in ("query", "key", "value")} | {"params/positions"}
    if model.scan:
        vectors |= {f"{layer}/bias" for layer in ("out", "Dense_0", "Dense_1")}
        vectors |= {f"LayerNorm_{i}/{name}" for i in (0, 1) for name in ("scale", "bias")}
    assert kinds == vectors


@pytest.mark.full
def test_a_linen_vision_transformer():
    hold(
        Vit().apply,
        params_of(Vit(), images()),
        images(),
        integers(3, 2),
        jp.CrossEntropy(),
        owned=ADDED + "|token",
        zero="key/bias",
    )


CELLS = ("LSTMCell", "OptimizedLSTMCell", "GRUCell", "SimpleCell", "MGUCell")


@pytest.mark.full
@pytest.mark.parametrize("name", CELLS)
def test_a_linen_recurrent_network(name):
    model, x = Recurrent(getattr(nn, name)), normal(3, 5, 3)
    hold(model.apply, params_of(model, x), x, normal(3, 2))


def test_an_nnx_mlp():
    class MLP(nnx.Module):
        def __init__(self, rngs):
            self.first, self.last = nnx.Linear(4, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)
            self.norm = nnx.LayerNorm(6, rngs=rngs)

        def __call__(self, x):
            return self.last(self.norm(jax.nn.gelu(self.first(x))))

    graph, state = nnx.split(MLP(nnx.Rngs(0)))

    def fn(params, x):
        return nnx.merge(graph, params)(x)

    hold(fn, drawn(state), normal(5, 4), integers(3, 5), jp.CrossEntropy(), diagonal=True)


def nnx_transformer():
    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs)
            self.up = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
            self.down = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

        def __call__(self, x):
            x = x + self.attention(self.norm(x), mask=nnx.make_causal_mask(x[..., 0]))
            return x + self.down(jax.nn.gelu(self.up(x)))

    class Transformer(nnx.Module):
        def __init__(self, rngs):
            self.table = nnx.Embed(VOCAB, WIDTH, dtype=jnp.float64, rngs=rngs)
            self.layers = nnx.List([Layer(rngs), Layer(rngs)])
            self.head = nnx.Linear(WIDTH, VOCAB, rngs=rngs)

        def __call__(self, ids):
            x = self.table(ids)
            for layer in self.layers:
                x = layer(x)
            return self.head(x)

    return nnx.split(Transformer(nnx.Rngs(0)), nnx.Param, ...)


@pytest.mark.full
def test_an_nnx_transformer():
    graph, params, rest = nnx_transformer()

    def fn(params, ids):
        return nnx.merge(graph, params, rest)(ids)

    (ids, target), loss = tokens(), jp.CrossEntropy()
    softmax_in_float32 = 1e-7
    hold(
        fn,
        drawn(params),
        ids,
        target,
        loss,
        owned=ADDED,
        zero="key/bias",
        nothing=softmax_in_float32,
    )


def test_adapters_of_a_frozen_linen_network():
    """The adapters' products are added to those of the base, which is not learned."""
    model, x, target = Mlp(), normal(5, 4), normal(5, 3)
    base = params_of(model, x)
    shapes = {"Dense_0": (4, 6), "Dense_1": (6, 5), "Dense_2": (5, 3)}
    floats = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float64)
    adapters = drawn(
        {name: {"a": floats((i, 2)), "b": floats((2, o))} for name, (i, o) in shapes.items()}
    )

    def fn(params, x):
        def call(next_fun, args, kwargs, context):
            y = next_fun(*args, **kwargs)
            if context.module.name in params["adapters"] and context.method_name == "__call__":
                adapter = params["adapters"][context.module.name]
                y = y + args[0] @ adapter["a"] @ adapter["b"] * 0.5
            return y

        with nn.intercept_methods(call):
            return model.apply(params["base"], x)

    hold(fn, {"base": jp.freeze(base), "adapters": adapters}, x, target, diagonal=True)


def test_dropout_with_a_key_for_each_example():
    class Dropping(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(nn.Dropout(0.5, deterministic=False)(nn.Dense(6)(x)))

    model, x = Dropping(), normal(5, 4)
    shapes = jax.eval_shape(
        model.init, {"params": jax.random.key(0), "dropout": jax.random.key(0)}, x
    )

    def fn(params, batch):
        x, keys = batch
        return jax.vmap(lambda x, key: model.apply(params, x, rngs={"dropout": key}))(x, keys)

    keys = jax.random.split(jax.random.key(1), 5)
    hold(fn, drawn(shapes), (x, keys), normal(5, 3))


def test_running_statistics_are_unlearned():
    """A BatchNorm in inference mode, whose statistics are next to the params."""

    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(nn.BatchNorm(use_running_average=True)(nn.Dense(6)(x)))

    model, x = Normed(), normal(5, 4)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    params = drawn(variables["params"])
    stats = jax.tree.map(lambda leaf: jnp.abs(leaf) + 0.5, drawn(variables["batch_stats"], 1))
    marked = {"params": params, "batch_stats": jp.freeze(stats)}
    hold(model.apply, marked, x, normal(5, 3))


def test_batch_norm_in_training_is_refused():
    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(nn.BatchNorm(use_running_average=False)(nn.Dense(6)(x)))

    model, x = Normed(), normal(5, 4)
    variables = drawn(jax.eval_shape(model.init, jax.random.key(0), x))
    marked = {"params": variables["params"], "batch_stats": jp.freeze(variables["batch_stats"])}

    def fn(params, x):
        return model.apply(params, x, mutable=["batch_stats"])[0]

    norms = jp.per_example_sq_norms(jp.function(fn), jp.HalfSquaredError())
    with pytest.raises(ValueError, match=r"in BatchNorm_0|BatchNorm_0 lets one reach another"):
        norms(marked, x, normal(5, 3))


@pytest.mark.full
def test_one_dropout_key_for_all_examples_is_refused():
    model, x = nn.Dropout(0.5, deterministic=False), normal(5, 4)

    def fn(params, x):
        return model.apply({}, x @ params["w"], rngs={"dropout": params["key"]})

    params = {"w": normal(4, 3), "key": jp.Unlearned(jax.random.key(0))}
    norms = jp.per_example_sq_norms(jp.function(fn), jp.HalfSquaredError())
    with pytest.raises(ValueError, match="give x a key for each example"):
        norms(params, x, normal(5, 3))


def only(word, params):
    """Params of which only those with a name that ends in the word are learned."""

    def of(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return leaf if name.endswith(word) else jp.Unlearned(leaf)

    return jax.tree.map_with_path(of, params)


@pytest.mark.full
@pytest.mark.full
@pytest.mark.parametrize("name", ["cnn", *GPTS, *CELLS])
def test_curvature(name):
    if name in CELLS:
        model, x, target = Recurrent(getattr(nn, name)), normal(3, 5, 3), normal(3, 2)
    elif name in GPTS:
        model, (x, target) = GPTS[name], tokens()
    else:
        model, x, target = Cnn(), images(), integers(3, 2)
    loss = jp.HalfSquaredError() if name in CELLS else jp.CrossEntropy()
    hold_curvature(jp.function(model.apply), loss, params_of(model, x), x, target)


@pytest.mark.full
def test_kronecker_factors_of_linen_are_those_of_our_layers():
    """The same params in this library's Dense layers give the same factors."""
    x, target, loss = normal(5, 4), integers(3, 5), jp.CrossEntropy()
    model = Mlp()
    params = params_of(model, x)
    net = jp.chain(jp.Dense(6), jp.Gelu(), jp.Dense(5), jp.Gelu(), jp.Dense(3))
    dense = [params["params"][f"Dense_{i}"] for i in range(3)]
    filled = iter(dense)
    ours = tuple(
        p._replace(w=(d := next(filled))["kernel"], b=d["bias"]) if jax.tree.leaves(p) else p
        for p in net.init(jax.random.key(0), x)
    )
    assert relative_error(model.apply(params, x), net(ours, x)) <= 1e-12
    got = jax.jit(jp.kronecker_factors(jp.function(model.apply), loss))(params, x, target)
    want = jax.jit(jp.kronecker_factors(net, loss))(ours, x, target)
    for index, layer in enumerate(layer for layer in want if jax.tree.leaves(layer)):
        factors = got["params"][f"Dense_{index}"]
        hold_leaves((factors["kernel"], factors["bias"]), (layer.w, layer.b))


@pytest.mark.full
def test_kronecker_factors_of_a_network_with_biases():
    """For one example, a bias's block is a times b, as a kernel's is kron(a, b)."""
    x, target, model = normal(1, 4), integers(3, 1), Mlp()
    params, net, loss = params_of(model, x), jp.function(model.apply), jp.CrossEntropy()
    factors = jp.kronecker_factors(net, loss)(params, x, target)
    root = jp.ggn_root(net, loss)(params, x, target)
    for name in ("Dense_0", "Dense_1"):
        v = root["params"][name]["bias"][:, 0]
        a, b = factors["params"][name]["bias"]
        assert a.shape == (1, 1)
        assert relative_error(a * b, v.T @ v) <= 1e-10


@pytest.mark.full
def test_kronecker_factors_of_a_linen_gpt_are_finite_and_of_each_kernel():
    model, (ids, target) = GPTS["unrolled"], tokens()
    params = only("kernel", params_of(model, ids))
    f = jax.jit(jp.kronecker_factors(jp.function(model.apply), jp.CrossEntropy()))
    block = f(params, ids, target)["params"]["Block_0"]
    attention = block["MultiHeadDotProductAttention_0"]
    assert attention["query"]["kernel"].a.shape == attention["query"]["kernel"].b.shape == (8, 8)
    assert block["Dense_0"]["kernel"].b.shape == (16, 16)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(block))


@pytest.mark.full
def test_kronecker_factors_of_a_whole_linen_gpt():
    """Learned positions and biases of heads have own shares; their rows are independent."""
    model, (ids, target) = GPTS["unrolled"], tokens()
    params, net, loss = params_of(model, ids), jp.function(model.apply), jp.CrossEntropy()
    factors = jax.jit(jp.kronecker_factors(net, loss))(params, ids, target)["params"]
    root = jax.jit(jp.ggn_root(net, loss))(params, ids, target)["params"]
    attention = ("Block_0", "MultiHeadDotProductAttention_0", "query", "bias")
    for path in (attention, ("positions",)):
        kronecker, columns = factors, root
        for key in path:
            kronecker, columns = kronecker[key], columns[key]
        rows = columns.shape[2]
        assert relative_error(kronecker.a, jnp.full(rows, 1 / rows)) <= 1e-12  # a diagonal
        blocks = jnp.einsum("cnro,cnrp->op", columns, columns) / len(ids)
        assert relative_error(kronecker.b, blocks) <= 1e-10
    for leaf in jax.tree.leaves(factors):
        assert bool(jnp.isfinite(leaf).all())

"""Attention beyond the table: masks, long sequences, large logits, PyTorch; and positions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from table import normal, relative_error

import jaxprop as jp

SAVES = ["weights", "logsumexp"]
saves = pytest.mark.parametrize("save", SAVES)
causals = pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])


@functools.partial(jax.jit, static_argnums=0)
def both_ways(layer, params, x, ct):
    """(y, d_x) by hand."""
    y, residuals = layer.forward(params, x)
    d_params, d_x = layer.backward(params, residuals, ct)
    assert d_params == ()
    return y, d_x


def by_definition(layer, mask, x):
    """All scores at once, without regard for overflow; padded positions are zeros."""
    n, t, c = x.shape
    x = jnp.where(mask[..., None], x, 0)
    d = c // (3 * layer.heads)
    q, k, v = (z.reshape(n, t, layer.heads, d) for z in jnp.split(x, 3, -1))
    s = jnp.einsum("nqhd,nkhd->nhqk", q, k) / np.sqrt(d)
    seen = jnp.tri(t, dtype=bool) if layer.causal else jnp.ones((t, t), bool)
    seen = seen[None, None] & mask[:, None, None, :]
    e = jnp.where(seen, jnp.exp(s), 0)
    total = e.sum(-1, keepdims=True)
    p = e / jnp.where(total > 0, total, 1)
    return jnp.einsum("nhqk,nkhd->nqhd", p, v).reshape(n, t, -1)


def problem(n, t, c, dtype=jnp.float64):
    x, ct = normal(n, t, c), normal(n, t, c // 3)[::-1]
    return jax.device_put(x.astype(dtype)), jax.device_put(ct.astype(dtype))


def cast(dtype, *arrays):
    return [np.asarray(z).astype(dtype) for z in arrays]


@pytest.mark.few(1)
@causals
@saves
@pytest.mark.parametrize("t", [1, 65, 200])
def test_against_the_definition(t, save, causal):
    layer = jp.Attention(2, causal, save, block=48)
    x, ct = problem(2, t, 12)

    @jax.jit
    def by_autodiff(mask, x, ct):
        y, pull = jax.vjp(functools.partial(by_definition, layer, mask), x)
        return y, pull(ct)[0]

    for mask in (np.ones((2, t), bool), np.random.default_rng(t).uniform(size=(2, t)) < 0.5):
        expected = by_autodiff(mask, x, ct)
        assert relative_error(both_ways(layer, jp.Mask(mask), x, ct), expected) <= 1e-11
        if mask.all():
            assert relative_error(both_ways(layer, (), x, ct), expected) <= 1e-11


@causals
@saves
def test_padding_changes_nothing(save, causal):
    """What padded positions hold, even infinity or NaN, does not reach the real ones."""
    layer = jp.Attention(2, causal, save, block=4)
    x, ct = problem(2, 6, 12)
    y, d_x = both_ways(layer, (), x, ct)
    padding = ((0, 0), (0, 3), (0, 0))
    mask = np.pad(np.ones((2, 6), bool), padding[:2])
    longer = np.pad(x, padding, constant_values=7.0), np.pad(ct, padding)
    longer_y, longer_d_x = map(np.asarray, both_ways(layer, jp.Mask(mask), *longer))
    assert relative_error((longer_y[:, :6], longer_d_x[:, :6]), (y, d_x)) <= 1e-12
    assert np.all(longer_d_x[:, 6:] == 0)


@pytest.mark.few(4)
@causals
@saves
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32, jnp.bfloat16])
def test_rows_without_a_key_are_zero(dtype, save, causal):
    layer = jp.Attention(2, causal, save, block=2)
    x, ct = problem(3, 5, 12, dtype)
    mask = np.array([[0, 0, 1, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 0]], bool)
    y, d_x = cast(float, *both_ways(layer, jp.Mask(mask), x, ct))
    assert np.all(np.isfinite(y))
    assert np.all(np.isfinite(d_x))
    assert np.all(y[1] == 0)
    assert np.all(d_x[1] == 0)
    assert np.all(d_x[0, :2, 4:] == 0)
    if causal:
        assert np.all(y[0, :2] == 0)
        assert np.all(d_x[0, :2] == 0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@causals
@saves
def test_large_logits(save, causal, dtype):
    layer = jp.Attention(2, causal, save, block=4)
    x, ct = problem(2, 7, 12, dtype)
    x = x * 1000
    got = both_ways(layer, (), x, ct)
    assert all(leaf.dtype == dtype for leaf in got)
    wide = both_ways(layer, (), *cast(np.float64, x, ct))
    assert relative_error(got[0], wide[0]) <= 0.01
    finite = both_ways(layer, (), x * 1e15, ct) if dtype == jnp.bfloat16 else got
    assert all(np.all(np.isfinite(leaf)) for leaf in cast(float, got[1], *finite))


@causals
@saves
def test_bfloat16(save, causal):
    layer = jp.Attention(4, causal, save, block=32)
    x, ct = problem(2, 96, 96, jnp.bfloat16)
    wide = both_ways(layer, (), *cast(np.float64, x, ct))
    assert relative_error(both_ways(layer, (), x, ct), wide) <= 0.02


def test_what_is_kept():
    x, _ = problem(2, 128, 48, jnp.float32)

    def kept(layer):
        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(layer.forward, (), x)[1]))

    packed, heads = 2 * 128 * (48 + 16), 2 * 4 * 128
    assert kept(jp.Attention(4, save="logsumexp")) == packed + heads
    assert kept(jp.Attention(4, causal=False)) == packed + heads * (128 + 1)
    assert kept(jp.Attention(4)) == packed + heads * (96 + 1)


@causals
def test_logsumexp_takes_memory_linear_in_t(causal):
    def temp(save, t):
        x = jax.ShapeDtypeStruct((1, t, 48), jnp.float32)
        ct = jax.ShapeDtypeStruct((1, t, 16), jnp.float32)
        layer = jp.Attention(2, causal, save, block=32)
        return both_ways.lower(layer, (), x, ct).compile().memory_analysis().temp_size_in_bytes

    linear, square = (np.array([temp(save, t) for t in (512, 1024, 2048)]) for save in SAVES[::-1])
    assert np.all(linear[1:] <= 2.1 * linear[:-1])
    assert square[-1] >= 4 * square[0], square
    assert 8 * linear[-1] < square[-1], (linear, square)


def test_blocks_under_shard_map():
    layer = jp.Attention(2, save="logsumexp", block=2)
    x, ct = problem(4, 5, 12)
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    over = jax.sharding.PartitionSpec("d")
    f = functools.partial(both_ways, layer, ())
    sharded = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=(over, over), out_specs=(over, over)))
    assert relative_error(sharded(x, ct), f(x, ct)) <= 1e-12


@causals
@saves
def test_against_pytorch(save, causal):
    torch = pytest.importorskip("torch")
    x, ct = problem(2, 70, 24)
    packed = torch.tensor(np.asarray(x), requires_grad=True)
    q, k, v = packed.reshape(2, 70, 3, 4, 2).permute(2, 0, 3, 1, 4)
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    y = y.transpose(1, 2).reshape(2, 70, 8)
    y.backward(torch.tensor(np.asarray(ct)))
    got = both_ways(jp.Attention(4, causal, save, block=32), (), x, ct)
    assert relative_error(got, (y.detach().numpy(), packed.grad.numpy())) <= 1e-11


def test_errors():
    layer, x = jp.Attention(2), jnp.ones((3, 4, 12))
    with pytest.raises(ValueError, match=r"padding mask bool\[3, 4\], True where"):
        layer.forward(jp.Mask(jnp.ones((3, 5), bool)), x)
    for wrong in (jnp.ones((3, 4), bool), (jp.Mask(jnp.ones((3, 4), bool)),), None, []):
        with pytest.raises(ValueError, match=r"params are .*, but an input .* takes \(\)"):
            layer.forward(wrong, x)
    for wrong in (jnp.ones((3, 4)), [True]):
        with pytest.raises(TypeError, match=r"mask is bool \(N, T\), True where a position"):
            layer.bind((), mask=wrong)
    for shape in ((3, 12), (3, 4, 9), (3, 4, 10), (3, 0, 12)):
        with pytest.raises(ValueError, match=r"takes x of shape \(N, T, 3D\)"):
            layer.forward((), jnp.ones(shape))
    with pytest.raises(TypeError, match="takes floating x, not int32"):
        layer.forward((), x.astype(jnp.int32))
    with pytest.raises(TypeError, match=r"heads is a whole number, not 2\.0"):
        jp.Attention(2.0)
    with pytest.raises(ValueError, match="block is at least 1, not 0"):
        jp.Attention(2, block=0)
    with pytest.raises(TypeError, match="causal is True or False"):
        jp.Attention(2, "weights")
    with pytest.raises(ValueError, match="save is 'weights' or 'logsumexp', not 'x'"):
        jp.Attention(2, save="x")
    assert layer.bind((), mask=x[..., 0] > 0) != ()
    assert layer.bind(()) == ()


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_turns_pairs_of_features_by_complex_numbers(interleaved):
    x = normal(2, 9, 24)
    y, _ = jax.jit(jp.Rotary(2, base=100.0, interleaved=interleaved).forward)((), x)
    heads, turned = (np.asarray(z).reshape(2, 9, 3, 2, 2, 2) for z in (x, y))
    if interleaved:  # (pair, which of the two), to (which, pair)
        heads, turned = heads.swapaxes(-1, -2), turned.swapaxes(-1, -2)
    pairs = heads[..., 0, :] + 1j * heads[..., 1, :]
    angles = np.arange(9)[:, None] * np.array([1.0, 0.1])
    expected = pairs * np.exp(1j * angles)[:, None, None, :]
    expected[:, :, 2] = pairs[:, :, 2]
    np.testing.assert_allclose(turned[..., 0, :] + 1j * turned[..., 1, :], expected, atol=1e-14)


def test_rotary_of_fewer_heads_is_that_of_each_head():
    x = normal(2, 9, 8 * 4)
    q, k, v = np.split(x, [16, 24], -1)
    y, _ = jax.jit(jp.Rotary(4, kv_heads=2).forward)((), x)
    of_q, _ = jax.jit(jp.Rotary(4).forward)((), np.concatenate([q, q, q], -1))
    of_k, _ = jax.jit(jp.Rotary(2).forward)((), np.concatenate([k, k, k], -1))
    expected = np.concatenate([np.asarray(of_q)[..., :16], np.asarray(of_k)[..., :8], v], -1)
    assert relative_error(y, expected) <= 1e-15


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_scores_depend_on_the_distance_only(interleaved):
    """The same q and k everywhere: <q_t, k_s> is one number for each t - s."""
    x = np.broadcast_to(normal(1, 1, 24), (1, 6, 24))
    y = np.asarray(jax.jit(jp.Rotary(1, interleaved=interleaved).forward)((), x)[0])
    scores = y[0, :, :8] @ y[0, :, 8:16].T
    np.testing.assert_allclose(scores[1:, 1:], scores[:-1, :-1], atol=1e-13)
    assert np.ptp(scores[0]) > 0.01


def test_sinusoidal_positions_are_vaswani_s():
    y, _ = jax.jit(jp.SinusoidalPositions().forward)((), np.zeros((1, 3, 4)))
    expected = [[f(t / w) for w in (1, 100) for f in (np.sin, np.cos)] for t in range(3)]
    np.testing.assert_allclose(y[0], expected, atol=1e-15)


def test_positions_shares():
    """Rows from T on have a gradient of 0 for every example."""
    layer, x = jp.Positions(5), normal(3, 2, 4)
    params = jax.jit(layer.init)(jax.random.key(0), x)
    form, _ = jax.jit(layer.backward)(params, (), x)
    dense = jp.Stacked(np.pad(x, ((0, 0), (0, 3), (0, 0))))

    @jax.jit
    def asked(form):
        return [
            form.per_example(),
            form.sum(),
            form.weighted_sum(jnp.arange(3.0)),
            form.sq_norms(),
            form.inner_products(),
            form.second_moment(),
        ]

    assert relative_error(asked(form), asked(dense)) <= 1e-14


def test_errors_of_positions():
    x = jnp.ones((2, 6, 12))
    with pytest.raises(ValueError, match=r"Positions\(5\) has 5 positions, x .* has 6"):
        jp.Positions(5).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="length is at least 1"):
        jp.Positions(0)
    for layer in (jp.Positions(9), jp.SinusoidalPositions(), jp.Rotary(2)):
        with pytest.raises(ValueError, match=r"takes x of shape \(N, T, D\)"):
            layer.init(jax.random.key(0), x[0])
        with pytest.raises(TypeError, match="takes floating x, not int32"):
            layer.init(jax.random.key(0), x.astype(jnp.int32))
    with pytest.raises(ValueError, match="2 heads of an even number of features"):
        jp.Rotary(2).init(jax.random.key(0), jnp.ones((2, 3, 18)))
    with pytest.raises(ValueError, match="base must be positive"):
        jp.Rotary(2, base=0.0)


@saves
@pytest.mark.parametrize("bad", [1e10, np.inf, np.nan])
def test_what_stands_at_a_padded_position_does_not_matter(save, bad):
    layer = jp.Attention(2, causal=False, save=save)
    x, ct = problem(1, 5, 12)
    mask, spoiled = jp.Mask(np.array([[1, 1, 1, 0, 0]], bool)), np.array(x)
    spoiled[0, 3] = bad
    got = both_ways(layer, mask, spoiled, ct)
    expected = both_ways(layer, mask, x, ct)
    assert relative_error(got, expected) == 0
    real = both_ways(layer, (), x[:, :3], ct[:, :3])
    assert relative_error(np.asarray(got[0])[:, :3], real[0]) <= 1e-12

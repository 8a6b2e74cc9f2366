"""The pictures show the numbers that they are given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from table import normal

import jaxprop as jp
from jaxprop import plot

LOSS = jp.HalfSquaredError()


def explanations(net, x, target):
    params = net.init(jax.random.key(0), x)
    grow = [jax.tree.map(lambda p, k=k: p * k, params) for k in (1.0, 1.5, 2.0)]
    return [jp.explain(net, LOSS, params, x, target, keep=0) for params in grow]


def test_scales(tmp_path):
    x = jnp.asarray(normal(5, 4))
    net = jp.chain(jp.Dense(3), jp.Tanh(), jp.Dense(2))
    seen = explanations(net, x, normal(5, 2))
    figure = plot.scales(seen, [0, 10, 20], "epoch")
    left, right = figure.axes
    assert [line.get_label() for line in left.lines] == ["0 Dense(3)", "1 Tanh()", "2 Dense(2)"]
    assert [line.get_label() for line in right.lines] == ["0 Dense(3)", "2 Dense(2)"]
    np.testing.assert_array_equal(left.lines[0].get_xdata(), [0, 10, 20])
    rms = [one.layers["1"].summaries.ct.rms for one in seen]
    np.testing.assert_allclose(left.lines[1].get_ydata(), rms)
    grads = jax.grad(jp.loss_fn(net, LOSS))(net.init(jax.random.key(0), x), x, normal(5, 2))[0]
    flat = np.concatenate([np.ravel(leaf) for leaf in grads])
    np.testing.assert_allclose(right.lines[0].get_ydata()[0], np.sqrt(np.mean(flat**2)))
    assert left.get_xlabel() == "epoch"
    figure.savefig(tmp_path / "scales.png")


@pytest.mark.full
def test_scales_of_many_layers(tmp_path):
    x = normal(3, 4)
    net = jp.chain(*[layer for _ in range(7) for layer in (jp.Dense(4), jp.Tanh())])
    figure = plot.scales(explanations(net, x, x))
    assert len(figure.axes) == 3
    assert len(figure.axes[0].lines) == 14
    figure.savefig(tmp_path / "scales.png")


def test_norms(tmp_path):
    figure = plot.norms(jnp.array([1.0, 4.0, 9.0, jnp.nan]), max_norm=2.5)
    (axes,) = figure.axes
    assert sum(patch.get_height() for patch in axes.patches) == 3
    assert "4 examples' gradients, 1 not finite" in axes.get_title()
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts == ["median", "max_norm 2.5: 50% above"]
    figure.savefig(tmp_path / "norms.png")
    plot.norms([4.0, 4.0]).savefig(tmp_path / "same.png")


def test_gram(tmp_path):
    g = normal(4, 7)
    g[3] = 0
    figure = plot.gram(g @ g.T, labels=[1, 0, 1, 0])
    axes = figure.axes[0]
    drawn = axes.images[0].get_array()
    cosine = g[0] @ g[2] / np.linalg.norm(g[0]) / np.linalg.norm(g[2])
    assert drawn[2, 3] == pytest.approx(cosine)
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "1"]
    figure.savefig(tmp_path / "gram.png")
    plot.gram(g @ g.T).savefig(tmp_path / "plain.png")


def test_what_cannot_be_drawn():
    with pytest.raises(ValueError, match="there is no explanation"):
        plot.scales([])
    seen = explanations(jp.Tanh(), normal(2, 3), normal(2, 3))
    with pytest.raises(ValueError, match="2 steps for 3 explanations"):
        plot.scales(seen, [0, 1])
    with pytest.raises(ValueError, match=r"shape \(N,\), not \(2, 2\)"):
        plot.norms(np.ones((2, 2)))
    with pytest.raises(ValueError, match="none of the norms is finite"):
        plot.norms([np.nan])
    with pytest.raises(ValueError, match=r"shape \(N, N\), not \(3,\)"):
        plot.gram(np.ones(3))
    with pytest.raises(ValueError, match=r"labels of shape \(2,\) for 3 examples"):
        plot.gram(np.eye(3), [0, 1])

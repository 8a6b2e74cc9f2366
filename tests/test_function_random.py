"""``jp.function`` on random programs, composed of the ways in which params meet data."""

import math

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
from functions import TOLERANCE, both, squashed
from hypothesis import given
from jax import lax

import jaxprop as jp

EXAMPLES, LARGEST, VOCAB = 3, 3, 5
FLOOR = 1e-13  # what rounding leaves of a gradient of 0, relative to the tree's largest entry


class Program:
    """A random function of params and a batch; each of its steps keeps the example on axis 0.

    Attributes:
        params: its params, drawn while it is built.
        steps: functions of (params, h, x); the first gets x["floats"] as h.
    """

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.params = {}
        shape = self.sizes(self.rng.integers(1, 4))
        self.x = {
            "floats": jnp.asarray(self.rng.normal(size=(EXAMPLES, *shape))),
            "ids": jnp.asarray(self.rng.integers(0, VOCAB, (EXAMPLES, 2))),
        }
        self.steps = []
        for _ in range(self.rng.integers(1, 5)):
            step, shape = self.step(shape, depth=2)
            self.steps.append(step)
        if not self.params:
            step, shape = self.product(shape)
            self.steps.append(step)
        if self.rng.random() < 0.2:
            self.param((2, 3))  # not used
        self.target = jnp.asarray(self.rng.normal(size=(EXAMPLES, *shape)))

    def __call__(self, params, x):
        h = x["floats"]
        for step in self.steps:
            h = step(params, h, x)
        return h

    def choose(self, options):
        return options[self.rng.integers(len(options))]

    def sizes(self, number):
        return tuple(int(size) for size in self.rng.integers(1, LARGEST + 1, number))

    def param(self, shape):
        """A function of params that returns one of this shape, perhaps an existing one."""
        old = [name for name, p in self.params.items() if p.shape == tuple(shape)]
        if old and self.rng.random() < 0.3:
            name = self.choose(old)
        else:
            name = f"p{len(self.params)}"
            size = 1 / math.sqrt(max(1, math.prod(shape[:-1])))
            self.params[name] = jnp.asarray(self.rng.normal(size=shape) * size)
        return lambda params: params[name]

    def view(self, shape, depth=2):
        """A function of params that returns an array of this shape, computed from params."""
        if not depth or self.rng.random() < 0.4:
            return self.param(shape)
        kind = self.rng.integers(10)
        axis = int(self.rng.integers(len(shape))) if shape else 0
        if kind == 0 and len(shape) > 1:
            axes = tuple(int(a) for a in self.rng.permutation(len(shape)))
            inner = self.view([shape[a] for a in np.argsort(axes)], depth - 1)
            return lambda params: jnp.transpose(inner(params), np.argsort(np.argsort(axes)))
        if kind == 1:
            inner = self.view((math.prod(shape),), depth - 1)
            return lambda params: inner(params).reshape(shape)
        if kind == 2 and shape:
            more, start = [int(n) for n in self.rng.integers(0, 3, 2)]
            stride = int(self.rng.integers(1, 3))
            larger = list(shape)
            larger[axis] = start + (shape[axis] - 1) * stride + 1 + more
            stop = larger[axis] - more
            inner = self.view(larger, depth - 1)
            return lambda params: lax.slice_in_dim(inner(params), start, stop, stride, axis)
        if kind == 3 and shape:
            inner = self.view(shape, depth - 1)
            return lambda params: jnp.flip(inner(params), axis)
        if kind == 4 and shape and shape[axis] > 1:
            at = int(self.rng.integers(1, shape[axis]))
            first, last = list(shape), list(shape)
            first[axis], last[axis] = at, shape[axis] - at
            parts = [self.view(part, depth - 1) for part in (first, last)]
            return lambda params: jnp.concatenate([part(params) for part in parts], axis)
        if kind == 5 and shape:
            rest = [size for a, size in enumerate(shape) if a != axis]
            parts = [self.view(rest, depth - 1) for _ in range(shape[axis])]
            return lambda params: jnp.stack([part(params) for part in parts], axis)
        if kind == 6:
            inner, c = self.view(shape, depth - 1), float(self.rng.choice([-1.0, 0.5, 3.0]))
            how = self.choose([lambda w: w * c, lambda w: c * w, lambda w: w / c, lambda w: -w])
            return lambda params: how(inner(params))
        if kind == 7:
            inner = self.view((1, *shape), depth - 1)
            return lambda params: jnp.squeeze(inner(params), 0)
        if kind == 8:
            inner = self.view(shape, depth - 1)
            return jax.jit(lambda params: inner(params).astype(jnp.float64))
        if kind == 9 and shape:
            twice = list(shape)
            twice[axis] *= 2
            inner, which = self.view(twice, depth - 1), int(self.rng.integers(2))
            return lambda params: jnp.split(inner(params), 2, axis)[which]
        return self.param(shape)

    def step(self, shape, depth):
        """A step from h (N, *shape), and the shape of its result."""
        kinds = [self.product, self.product, self.convolution]
        kinds += [self.added, self.summed, self.looked_up]
        if depth and self.rng.random() < 0.45:
            return self.choose([self.repeated, self.over_time, self.chosen, self.wrapped])(
                shape, depth - 1
            )
        step, shape = self.choose(kinds)(shape)
        f = self.choose([jnp.tanh, jnp.sin, lambda h: h])
        return (lambda params, h, x: f(step(params, h, x))), shape

    def keeping(self, shape, depth):
        """A step that keeps the shape."""
        if self.rng.random() < 0.3:
            return self.added(shape)[0]
        features = shape[-1]
        w = self.view((features, features))
        return lambda params, h, x: jnp.tanh(h @ w(params))

    def product(self, shape):
        """A dot_general whose axes are contracted, batched or free at random."""
        roles = [self.choose("cbf") for _ in shape]
        if roles and set(roles) == {"f"} and self.rng.random() < 0.7:
            roles[-1] = "c"
        contracted = [1 + a for a, role in enumerate(roles) if role == "c"]
        batched = [1 + a for a, role in enumerate(roles) if role == "b"]
        free = self.sizes(self.rng.integers(0, 3))
        kinds = [*(("c", a) for a in contracted), *(("b", a) for a in batched)]
        kinds += [("f", index) for index in range(len(free))]
        order = [kinds[i] for i in self.rng.permutation(len(kinds))]
        sizes = [free[a] if role == "f" else shape[a - 1] for role, a in order]
        w, data_first = self.view(sizes), bool(self.rng.random() < 0.5)
        places = {kind: axis for axis, kind in enumerate(order)}
        of_w = [places["c", a] for a in contracted], [places["b", a] for a in batched]

        def step(params, h, x):
            if data_first:
                numbers = ((contracted, of_w[0]), (batched, of_w[1]))
                y = lax.dot_general(h, w(params), numbers)
                example = len(batched)
            else:
                numbers = ((of_w[0], contracted), (of_w[1], batched))
                y = lax.dot_general(w(params), h, numbers)
                example = len(batched) + len(free)
            return jnp.moveaxis(y, example, 0)

        whole = jax.eval_shape(
            lambda h: step(self.params, h, None),
            jax.ShapeDtypeStruct((EXAMPLES, *shape), jnp.float64),
        )
        if whole.ndim > 4 or whole.size > 300:
            return step_to_sum(step), ()
        return step, whole.shape[1:]

    def convolution(self, shape):
        """A convolution with random layouts, over an h of two or three axes."""
        if len(shape) not in (2, 3):
            return self.product(shape)
        *space, channels = shape
        rng, rank = self.rng, len(space)
        groups = int(self.choose([d for d in (1, 2, 3) if channels % d == 0]))
        features = groups * int(rng.integers(1, 3))
        window = self.sizes(rank)
        kernel = (features, channels // groups, *window)
        x_layout, w_layout, y_layout = (tuple(map(int, rng.permutation(rank + 2))) for _ in "xwy")
        numbers = lax.ConvDimensionNumbers(x_layout, w_layout, y_layout)
        w = self.view([kernel[i] for i in np.argsort(w_layout)])
        options = {
            "window_strides": tuple(map(int, rng.integers(1, 3, rank))),
            "padding": [(int(a), int(b)) for a, b in rng.integers(0, 3, (rank, 2))],
            "rhs_dilation": tuple(map(int, rng.integers(1, 3, rank))),
            "lhs_dilation": tuple(map(int, rng.integers(1, 3, rank))),
            "feature_group_count": groups,
        }

        def step(params, h, x):
            first = jnp.moveaxis(h, -1, 1)  # (N, channels, *space), transposed below
            y = lax.conv_general_dilated(
                jnp.transpose(first, np.argsort(x_layout)),
                w(params),
                dimension_numbers=numbers,
                **options,
            )
            return jnp.moveaxis(jnp.transpose(y, y_layout), 1, -1)

        whole = jax.eval_shape(
            lambda h: step(self.params, h, None),
            jax.ShapeDtypeStruct((EXAMPLES, *shape), jnp.float64),
        )
        if not whole.size:
            return self.product(shape)
        return (step, whole.shape[1:]) if whole.size <= 300 else (step_to_sum(step), ())

    def added(self, shape):
        """A bias or a scale along some of the axes."""
        axes = tuple(int(size) if self.rng.random() < 0.6 else 1 for size in shape)
        b = self.view(axes)
        how = self.choose([jnp.add, jnp.multiply, lambda h, b: h - jnp.exp(b)])

        def step(params, h, x):
            return how(h, jnp.broadcast_to(b(params)[None], h.shape))

        return step, shape

    def summed(self, shape):
        """Two products with h, or with its means over some axes, which are then broadcast."""
        if not shape:
            return self.added(shape)
        how = self.choose([jnp.add, jnp.add, jnp.subtract, jnp.multiply])
        features = int(self.rng.integers(1, LARGEST + 1))
        parts, sizes = [], []
        for width in (features, self.choose([features, 1])):
            axes = tuple(a for a in range(1, len(shape)) if self.rng.random() < 0.4)
            parts.append((axes, self.view((shape[-1], width))))
            kept = [1 if a in axes else size for a, size in enumerate(shape[:-1], 1)]
            sizes.append((*kept, width))

        def step(params, h, x):
            return how(*(h.mean(axes, keepdims=True) @ w(params) for axes, w in parts))

        return step, tuple(map(max, *sizes))

    def looked_up(self, shape):
        """Rows of a table, added to h."""
        table, mode = self.view((VOCAB, *shape)), self.choose([None, "clip", "fill", "each"])

        def step(params, h, x):
            rows, ids = table(params), x["ids"]
            if mode is None:
                found = rows[ids]
            elif mode == "each":
                found = jax.vmap(jax.vmap(lambda i: rows[i]))(ids)
            else:
                found = jnp.take(rows, ids + 1, axis=0, mode=mode, fill_value=0.0)
            return h + jnp.sin(found).sum(1)

        return step, shape

    def repeated(self, shape, depth):
        """A scan over layers, or a loop that reuses one param at each turn, or that carries it."""
        if not shape:
            return self.added(shape)
        features, turns = shape[-1], int(self.rng.integers(1, 4))
        kind = self.choose(["layers", "layers of layers", "loop", "carried"])
        if kind == "loop":
            inner = self.keeping(shape, depth)

            def step(params, h, x):
                return lax.fori_loop(0, turns, lambda i, h: inner(params, h, x), h)

        elif kind == "carried":
            w = self.view((features, features))

            def turn(carry, _):
                w, h = carry
                return (jnp.sin(w), jnp.tanh(h @ w)), None

            def step(params, h, x):
                return lax.scan(turn, (w(params), h), length=turns)[0][1]

        else:
            layers = (turns, 2) if kind == "layers of layers" else (turns,)
            stack, f = self.view((*layers, features, features), 1), layer
            if len(layers) > 1:

                def f(h, w):
                    return lax.scan(layer, h, w, reverse=True)[0], None

            def step(params, h, x):
                return lax.scan(f, h, stack(params))[0]

        return step, shape

    def over_time(self, shape, depth):
        """A recurrence along the first axis of an example."""
        if len(shape) < 2:
            return self.product(shape)
        features = shape[-1]
        w, u = self.view((features, features)), self.view((features, features))
        inner = self.keeping(shape[1:], depth)
        last = bool(self.rng.random() < 0.5)

        def step(params, h, x):
            def turn(state, now):
                state = jnp.tanh(state @ w(params) + now @ u(params))
                return state, inner(params, state, x)

            state, each = lax.scan(turn, h[:, 0] * 0, jnp.moveaxis(h, 1, 0))
            return state if last else jnp.moveaxis(each, 0, 1)

        return step, shape[1:] if last else shape

    def chosen(self, shape, depth):
        """A conditional by a number that all examples share, or by each example."""
        if not shape:
            return self.added(shape)
        first, second = self.keeping(shape, depth), self.keeping(shape, depth)
        kind = self.choose(["in a scan", "of each example"])

        def step(params, h, x):
            if kind == "in a scan":
                branches = [lambda h: first(params, h, x), lambda h: second(params, h, x)]
                return lax.scan(lambda h, i: (lax.switch(i, branches, h), None), h, jnp.arange(2))[
                    0
                ]

            def alone(inner):
                return lambda h: inner(params, h[None], None)[0]

            def of_one(h):
                return lax.cond(jnp.sum(h) > 0, alone(first), alone(second), h)

            return jax.vmap(of_one)(h)

        return step, shape

    def wrapped(self, shape, depth):
        """A step inside checkpoint, jit, vmap, or a function with its own rule."""
        step, after = self.step(shape, depth)
        kind = self.choose(["checkpoint", "jit", "custom_jvp", "custom_vjp", "vmap"])
        if kind == "checkpoint":
            return jax.checkpoint(step), after
        if kind == "jit":
            return jax.jit(step), after
        if kind == "vmap":

            def of_one(params, h, x):
                return step(params, h[None], jax.tree.map(lambda leaf: leaf[None], x))[0]

            return jax.vmap(of_one, (None, 0, 0)), after
        f = squashed if kind == "custom_jvp" else halved
        return (lambda params, h, x: f(step(params, h, x))), after


def layer(h, w):
    return jnp.tanh(h @ w), None


def step_to_sum(step):
    return lambda params, h, x: jnp.sin(step(params, h, x)).reshape(len(h), -1).sum(1)


@jax.custom_vjp
def halved(x):
    """sin, with half of its derivative in its rule: the rule is used, not the derivative."""
    return jnp.sin(x)


halved.defvjp(lambda x: (jnp.sin(x), x), lambda x, ct: (0.5 * ct * jnp.cos(x),))


def hold_program(seed, diagonal=False):
    """Compare every quantity of a random program with its oracle, leaf by leaf."""
    program = Program(seed)
    if program.target.size == EXAMPLES:  # the squared error needs features
        program.steps.append(lambda params, h, x: h.reshape(len(h), 1))
        program.target = program.target.reshape(EXAMPLES, 1)
    got, want = jax.jit(
        lambda *args: both(program.__call__, jp.HalfSquaredError(), False, diagonal, *args)
    )(program.params, program.x, program.target)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for name, tree in want.items():
        pairs = zip(jax.tree.leaves_with_path(got[name]), jax.tree.leaves(tree), strict=True)
        pairs = [(path, np.asarray(a), np.asarray(b)) for (path, a), b in pairs]
        largest = max(np.max(np.abs(b), initial=0) for _, _, b in pairs)
        for path, a, b in pairs:
            assert a.shape == b.shape
            allowed = TOLERANCE * np.max(np.abs(b), initial=0) + FLOOR * largest
            error = np.max(np.abs(a - b), initial=0)
            assert error <= allowed, f"{name}{jax.tree_util.keystr(path)}: {error} > {allowed}"


@given(st.integers(0, 2**32 - 1))
def test_every_quantity_of_a_random_program(seed):
    hold_program(seed)

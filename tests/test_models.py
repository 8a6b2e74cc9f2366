"""GPT-2: the same logits, loss and gradients as in transformers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from table import relative_error

import jaxprop as jp
from jaxprop.models import Gpt2Config, gpt2, gpt2_params, gpt2_tensors, load_gpt2

SMALL = Gpt2Config(vocab=61, length=24, features=32, heads=4, layers=3)


def test_names_and_params_are_each_other_s_reverse():
    net, tokens = gpt2(SMALL), jnp.zeros((2, 7), jnp.int32)
    params = net.init(jax.random.key(0), tokens)
    tensors = gpt2_tensors(params)
    assert tensors["h.2.attn.c_attn.weight"].shape == (32, 96)
    again = gpt2_params({f"transformer.{name}": tensor for name, tensor in tensors.items()})
    assert relative_error(again, params) == 0
    net.check_params(again, tokens)


def test_a_published_file_is_loaded(tmp_path):
    net, tokens = gpt2(SMALL), jnp.ones((2, 7), jnp.int32)
    params = jax.tree.map(
        lambda leaf: leaf.astype(jnp.float32), net.init(jax.random.key(0), tokens)
    )
    tensors = {name: np.asarray(tensor) for name, tensor in gpt2_tensors(params).items()}
    tensors["h.0.attn.bias"] = np.tri(24, dtype=np.float32)  # a mask, as the published file has
    save_file(tensors, tmp_path / "model.safetensors")
    loaded, again = load_gpt2(tmp_path / "model.safetensors", heads=4)
    assert loaded == net
    assert relative_error(again, params) == 0


def test_the_published_sizes():
    params = jax.eval_shape(
        gpt2(Gpt2Config()).init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32)
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 124_439_808


def test_scanned_and_unrolled_are_one_network():
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, SMALL.vocab)
    scanned, unrolled = (gpt2(SMALL, scan=scan) for scan in (True, False))
    params = scanned.init(jax.random.key(0), tokens)
    table, (positions, blocks, last) = params
    apart = [jax.tree.map(lambda leaf, i=i: leaf[i], blocks) for i in range(SMALL.layers)]
    y, _ = scanned.forward(params, tokens)
    expected, _ = unrolled.forward((table, (positions, *apart, last)), tokens)
    assert relative_error(y, expected) <= 1e-12


def test_dropout_takes_effect_with_a_key():
    net, tokens = gpt2(SMALL._replace(dropout=0.1)), jnp.ones((2, 9), jnp.int32)
    params = net.init(jax.random.key(0), tokens)
    given = net.bind(params, key=jax.random.key(1))
    difference = net.forward(params, tokens)[0] - net.forward(given, tokens)[0]
    assert float(jnp.abs(difference).max()) > 0.01


@pytest.mark.filterwarnings("ignore")
def test_against_transformers(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=61, n_positions=24, n_embd=32, n_layer=3, n_head=4,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for param in theirs.parameters():
            param += 0.05 * torch.randn_like(param)
    theirs.transformer.save_pretrained(tmp_path)
    net, params = load_gpt2(tmp_path / "model.safetensors", heads=4)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)

    tokens = np.random.default_rng(0).integers(0, 61, (3, 21))
    out = theirs(torch.tensor(tokens[:, :-1]))
    flat = out.logits.reshape(-1, 61), torch.tensor(tokens[:, 1:]).reshape(-1)
    their_loss = torch.nn.functional.cross_entropy(*flat)
    their_loss.backward()

    x, target = jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:])
    logits, _ = net.forward(params, x)
    assert relative_error(logits, out.logits.detach().numpy()) <= 1e-4
    value, grads = jax.jit(jp.value_and_grad(net, jp.CrossEntropy()))(params, x, target)
    assert abs(float(value) - float(their_loss)) <= 1e-4 * float(their_loss)
    named = dict(theirs.transformer.named_parameters())
    for name, grad in gpt2_tensors(grads).items():
        assert relative_error(grad, named[name].grad.numpy()) <= 1e-4, name


def published(**changes):
    """The tensors of a small GPT-2, some of them changed or (by None) left out."""
    params = gpt2(SMALL).init(jax.random.key(0), jnp.ones((2, 7), jnp.int32))
    tensors = {k: np.asarray(v, np.float32) for k, v in gpt2_tensors(params).items()}
    tensors |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"lm_head__weight": np.ones((61, 32), "f4")}, ValueError, "lm_head.weight is not the ta"),
        ({"h__0__mlp__gate": np.ones(3, "f4")}, ValueError, "has no tensor 'h.0.mlp.gate'"),
        ({"h__1__ln_2__bias": None}, KeyError, "has a tensor 'h.1.ln_2.bias', which is missing"),
        ({"wpe__weight": None}, KeyError, "has a tensor 'wpe.weight', which is missing"),
    ],
)
def test_every_tensor_is_accounted_for(changes, error, message):
    with pytest.raises(error, match=message):
        gpt2_params(published(**changes))


def test_a_gap_among_the_blocks_is_a_missing_tensor():
    tensors = {k: v for k, v in published().items() if not k.startswith("h.1.")}
    with pytest.raises(KeyError, match=r"of 2 blocks has a tensor 'h\.1\.attn\.c_attn\.bias'"):
        gpt2_params(tensors)
    with pytest.raises(KeyError, match="a GPT-2 of 0 blocks has a tensor"):
        gpt2_params({k: v for k, v in published().items() if not k.startswith("h.")})


def test_a_head_that_is_the_table_is_no_param():
    tensors = published()
    again = gpt2_params(tensors | {"lm_head.weight": tensors["wte.weight"]})
    assert relative_error(again, gpt2_params(tensors)) == 0


@pytest.mark.parametrize(
    ("config", "heads", "message"),
    [
        ({"n_head": 4}, 8, "config.json: n_head is 4, not 8"),
        ({"n_head": 5}, None, "heads divides the 32 features, but is 5"),
        ({"n_head": 4, "activation_function": "relu"}, None, "activation_function is 'relu'"),
        ({"n_head": 4, "layer_norm_epsilon": 1e-6}, None, "layer_norm_epsilon is 1e-06"),
        ({"n_head": 4, "tie_word_embeddings": False}, None, "tie_word_embeddings is False"),
    ],
)
def test_the_config_beside_the_file_must_agree(config, heads, message, tmp_path):
    save_file(published(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_gpt2(tmp_path / "model.safetensors", heads=heads)
    (tmp_path / "config.json").write_text(json.dumps({"n_head": 8, "n_layer": 3}))
    net, _ = load_gpt2(tmp_path / "model.safetensors")
    assert net == gpt2(SMALL._replace(heads=8))

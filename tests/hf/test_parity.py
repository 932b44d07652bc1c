"""Our models against those of `transformers`, on weights that pass through a folder both ways."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip('torch', reason='parity needs the extra hf-test')
transformers = pytest.importorskip('transformers', reason='parity needs the extra hf-test')

from tiny_models import BASE, CASES, FIRST, MODELS  # noqa: E402

import moe  # noqa: E402

LENGTH = 40  # past the 16 positions of the scaled models' first training, and every window
TOLERANCE = 1e-4


def build(family: str, name: str, seed: int = 0) -> Any:
    """A model whose every parameter is random: norms, biases (negative and large) and sinks too."""
    prefix, models = MODELS[family]
    config_class = 'Gemma3TextConfig' if prefix == 'Gemma3' else f'{prefix}Config'
    config = getattr(transformers, config_class)(**(BASE | models[name]))
    config._attn_implementation = 'eager'
    torch.manual_seed(seed)
    model = getattr(transformers, f'{prefix}ForCausalLM')(config).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        tensors = [*model.named_parameters(), *model.named_buffers()]
        for key, tensor in tensors:
            if 'inv_freq' in key:
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if 'e_score_correction_bias' in key:
                tensor.copy_(2 * noise - 1)
            elif tensor.ndim == 1 and 'norm' in key:
                tensor.copy_(1 + 0.3 * noise)
            elif 'bias' in key or 'sinks' in key:
                tensor.copy_(noise)
            elif 'embed' not in key:
                tensor.copy_(noise / tensor.shape[-1] ** 0.5)
    return model


@pytest.fixture(scope='module', params=CASES, ids='-'.join)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp('-'.join(request.param))
    theirs = build(*request.param)
    theirs.save_pretrained(folder / 'theirs')
    config, variables = moe.load_pretrained(folder / 'theirs', dtype='float32')
    return theirs, config, variables, folder


def tokens_for(config: Any, rows: int = 2) -> np.ndarray:
    return np.random.default_rng(3).integers(0, config.vocab_size, (rows, LENGTH))


def test_logits_experts_and_gradients(pair: Any) -> None:
    theirs, config, variables, _ = pair
    tokens = tokens_for(config)
    chosen = record_routing(theirs)
    logits = theirs(torch.tensor(tokens)).logits
    logits.square().mean().backward()

    def loss(variables: Any) -> Any:
        output: Any = moe.Transformer(config).apply(variables, tokens)
        return jnp.square(output.logits).mean(), output

    (_, output), gradient = jax.value_and_grad(loss, has_aux=True, allow_int=True)(variables)
    np.testing.assert_allclose(output.logits, logits.detach().numpy(), atol=TOLERANCE, rtol=1e-4)
    assert len(output.router) == len(chosen)
    for router, ids in zip(output.router, chosen, strict=True):
        ours = np.sort(np.asarray(router.expert_ids).reshape(ids.shape), axis=-1)
        np.testing.assert_array_equal(ours, np.sort(ids, axis=-1))
    check_gradients(theirs, config, gradient)


def record_routing(model: Any) -> list[np.ndarray]:
    """Notes which experts each router chooses, in the order of the layers."""
    chosen: list[np.ndarray] = []

    def note(_module: Any, _inputs: Any, output: Any) -> None:
        chosen.append(output[2].detach().numpy())

    for name, module in model.named_modules():
        if name.endswith(('mlp.gate', 'mlp.router', 'block_sparse_moe.gate')):
            module.register_forward_hook(note)
    return chosen


def check_gradients(theirs: Any, config: Any, gradient: Any) -> None:
    """Compares by exporting ours: a gradient has the names and shapes of what it belongs to."""
    from moe.families.match import family_of
    from moe.weights.pieces import model_pieces, to_theirs
    from moe.weights.shards import read_part

    ours = {}
    for piece in model_pieces(config, family_of(config)):
        if piece.path[0] == 'params':
            leaf = gradient
            for name in piece.path:
                leaf = leaf[name]
            ours[piece.name] = to_theirs(read_part(leaf, piece), piece)
    wanted = {name: p.grad.numpy() for name, p in theirs.named_parameters() if p.grad is not None}
    assert len(wanted) > 5
    largest = max(np.abs(gradient).max() for gradient in wanted.values())
    for name, gradient_there in wanted.items():
        # With one expert a token, whose weight is 1, the router's gradient is the rounding of 0.
        bound = 2e-4 * np.abs(gradient_there).max() + 1e-6 * largest
        found = gradient_here(name, ours)
        np.testing.assert_allclose(found, gradient_there, atol=bound, err_msg=name)


def gradient_here(name: str, ours: dict[str, np.ndarray]) -> np.ndarray:
    """Finds a gradient of ours, on file names, by the name that `transformers` has in memory."""
    renamed = any('.block_sparse_moe.' in key for key in ours)
    name = name.replace('.mlp.', '.block_sparse_moe.') if renamed else name
    if name in ours:
        return ours[name]
    # There all experts are one tensor, gate above up.
    experts, kind = name.rsplit('.', 1)
    gate, up, down = ('w1', 'w3', 'w2') if renamed else ('gate_proj', 'up_proj', 'down_proj')
    count = sum(key.startswith(experts) and key.endswith(f'.{down}.weight') for key in ours)

    def stacked(projection: str) -> np.ndarray:
        return np.stack([ours[f'{experts}.{e}.{projection}.weight'] for e in range(count)])

    return stacked(down) if kind == 'down_proj' else np.concatenate([stacked(gate), stacked(up)], 1)


# Compiling takes the time: one of each family, and those whose caches are rings.
@pytest.mark.parametrize(
    'pair', [*FIRST, ('qwen2', 'window'), ('mixtral', 'top1')], ids='-'.join, indirect=True
)
def test_greedy_generation(pair: Any) -> None:
    theirs, config, variables, _ = pair
    prompts, new = tokens_for(config)[:, :5], 8
    with torch.no_grad():
        wanted = theirs.generate(
            torch.tensor(prompts),
            attention_mask=torch.ones(prompts.shape, dtype=torch.long),
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )
    ours, _ = moe.generate(
        moe.Transformer(config),
        variables,
        prompts,
        max_new_tokens=new,
        temperature=0.0,
        key=jax.random.key(0),
    )
    np.testing.assert_array_equal(np.asarray(ours), wanted.numpy()[:, prompts.shape[1] :])


def test_export_loads_with_the_same_logits(pair: Any) -> None:
    theirs, config, variables, folder = pair
    moe.save_pretrained(folder / 'ours', config, variables)
    again, notes = type(theirs).from_pretrained(folder / 'ours', output_loading_info=True)
    assert not notes['missing_keys']
    assert not notes['unexpected_keys']
    again.config._attn_implementation = 'eager'
    tokens = torch.tensor(tokens_for(config))
    with torch.no_grad():
        np.testing.assert_array_equal(again(tokens).logits, theirs(tokens).logits)
    reread, copy = moe.load_pretrained(folder / 'ours', dtype='float32')
    assert reread == config
    for ours, copied in zip(jax.tree.leaves(variables), jax.tree.leaves(copy), strict=True):
        np.testing.assert_array_equal(ours, copied)


def test_flat_config_spelling_reads_alike(pair: Any) -> None:
    """What we write for version 4 says by itself what version 5's spelling says."""
    _, config, variables, folder = pair
    moe.save_pretrained(folder / 'ours', config, variables)
    file = folder / 'ours' / 'config.json'
    values = json.loads(file.read_text())
    for name in ('rope_parameters', 'dtype'):
        del values[name]
    if 'num_experts' in values:
        del values['num_local_experts']
    file.write_text(json.dumps(values))
    assert moe.convert.pretrained_config(folder / 'ours', 'float32') == config


def test_layers_of_multi_token_prediction_are_left_out(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    theirs = build('deepseek_v3', 'groups')
    theirs.save_pretrained(tmp_path)
    file = tmp_path / 'model.safetensors'
    tensors = load_file(file)
    layers = theirs.config.num_hidden_layers
    extra = {
        key.replace('layers.1.', f'layers.{layers}.'): value.clone()
        for key, value in tensors.items()
        if 'layers.1.' in key
    }
    extra[f'model.layers.{layers}.eh_proj.weight'] = torch.ones(24, 48)
    save_file(tensors | extra, file, metadata={'format': 'pt'})
    config, variables = moe.load_pretrained(tmp_path, dtype='float32')
    tokens = tokens_for(config)
    output: Any = moe.Transformer(config).apply(variables, tokens)
    logits = theirs(torch.tensor(tokens)).logits.detach().numpy()
    np.testing.assert_allclose(output.logits, logits, atol=TOLERANCE, rtol=1e-4)


def test_the_text_of_a_model_of_images(tmp_path: Path) -> None:
    """Its images are left out, and it is written as the family of its text."""
    text = MODELS['gemma3_text'][1]['ropes'] | {'vocab_size': 61, 'num_hidden_layers': 3}
    text |= {name: BASE[name] for name in ('hidden_size', 'intermediate_size')}
    text |= {'num_attention_heads': 4, 'num_key_value_heads': 2}
    images = {'hidden_size': 8, 'intermediate_size': 8, 'num_hidden_layers': 1, 'patch_size': 14}
    images |= {'num_attention_heads': 2, 'image_size': 28}
    config = transformers.Gemma3Config(text_config=text, vision_config=images, image_token_index=60)
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / 'theirs')
    ours, variables = moe.load_pretrained(tmp_path / 'theirs', dtype='float32')
    tokens = np.random.default_rng(3).integers(0, 58, (2, LENGTH))
    logits = model(torch.tensor(tokens)).logits.detach().numpy()
    found = moe.Transformer(ours).apply(variables, tokens).logits
    np.testing.assert_allclose(found, logits, atol=TOLERANCE, rtol=1e-4)
    moe.save_pretrained(tmp_path / 'ours', ours, variables, card='x')
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'ours')
    assert type(again).__name__ == 'Gemma3ForCausalLM'
    text_logits = again(torch.tensor(tokens)).logits.detach().numpy()
    np.testing.assert_allclose(text_logits, logits, atol=TOLERANCE, rtol=1e-4)

"""Folders of published models: written and read bit for bit, on any mesh, and refused in words."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from family_models import MODELS, grouped, in_dtype, model, random_variables

import moe
from moe import InputError, MeshConfig, MoEConfig, RouterConfig, convert, make_mesh
from moe.families import FAMILIES
from moe.weights.files import DTYPES, Planned, read_header, write_file

SMALL = MODELS['qwen3_moe'][1]


def save(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes one file of these tensors."""
    planned = [Planned(name, array.dtype, array.shape) for name, array in tensors.items()]
    write_file(path, planned, tensors.__getitem__)


def read(path: Path) -> dict[str, np.ndarray]:
    return {name: np.array(stored.view()) for name, stored in read_header(path).items()}


def change(folder: Path, **tensors: np.ndarray | None) -> None:
    """Replaces tensors of a folder, adds them, or with None removes them; `__` is a dot."""
    file = folder / 'model.safetensors'
    held = read(file)
    for name, array in tensors.items():
        held.pop(name.replace('__', '.'), None)
        if array is not None:
            held[name.replace('__', '.')] = array
    save(file, held)


def set_config(folder: Path, **values: Any) -> None:
    file = folder / 'config.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def assert_same_bits(ours: Any, others: Any) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(others)
    for leaf, other in zip(jax.tree.leaves(ours), jax.tree.leaves(others), strict=True):
        assert leaf.dtype == other.dtype
        assert np.asarray(leaf).tobytes() == np.asarray(other).tobytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    moe.save_pretrained(tmp_path / 'model', SMALL, random_variables(SMALL))
    return tmp_path / 'model'


def test_every_family_has_a_model_here() -> None:
    assert {family for family, _ in MODELS.values()} == {f.model_type for f in FAMILIES}


@pytest.mark.parametrize('name', MODELS)
def test_export_and_import_give_the_same_bits(name: str, tmp_path: Path) -> None:
    family, config = MODELS[name]
    dtype: Any = 'bfloat16' if name == 'gpt_oss' else 'float32'
    config = in_dtype(config, dtype)
    variables = random_variables(config)
    moe.save_pretrained(tmp_path, config, variables)
    assert json.loads((tmp_path / 'config.json').read_text())['model_type'] == family
    again, loaded = moe.load_pretrained(tmp_path, dtype=dtype)
    # The same model, if not in the same words: no field that counts may differ.
    assert moe.family_of(again).model_type == family
    assert again.attention_layers == config.attention_layers
    assert again.moe_layers == config.moe_layers
    assert_same_bits(variables, loaded)


def test_layout_by_hand(tmp_path: Path) -> None:
    """Where single numbers of ours stand in the file, by the published definitions."""
    _, config = MODELS['gpt_oss']
    variables = random_variables(config)
    moe.save_pretrained(tmp_path, config, variables)
    held = read(tmp_path / 'model.safetensors')
    attention = variables['params']['group_0']['layer_1']['attention']
    q = held['model.layers.1.self_attn.q_proj.weight']
    assert q.shape == (4 * 6, 16)
    # Row 2 * 6 + 5 makes channel 5 of head 2; column 7 reads channel 7 of the stream.
    assert q[2 * 6 + 5, 7] == attention['q'][0, 7, 2, 5]
    o = held['model.layers.1.self_attn.o_proj.weight']
    assert o[7, 3 * 6 + 1] == attention['o'][0, 3, 1, 7]
    experts = variables['params']['group_0']['layer_1']['moe']
    gate_up = held['model.layers.1.mlp.experts.gate_up_proj']
    # Gate and up interleave: column 2 * 9 + 1 is the up projection to channel 9.
    assert gate_up[4, 3, 2 * 9 + 1] == experts['gate_up'][0, 4, 3, 1, 9]
    assert gate_up[4, 3, 2 * 9] == experts['gate_up'][0, 4, 3, 0, 9]


@pytest.mark.parametrize('scanned', [True, False])
def test_unstacked_layers_write_the_same_files(scanned: bool, tmp_path: Path) -> None:
    from moe.unstacked import relaid

    config = dataclasses.replace(SMALL, scan_layers=scanned)
    stacked = random_variables(SMALL)
    params = relaid(SMALL, config, stacked['params'])
    moe.save_pretrained(tmp_path / 'a', SMALL, stacked)
    moe.save_pretrained(tmp_path / 'b', config, params)
    a, b = (tmp_path / name / 'model.safetensors' for name in 'ab')
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize('name', ['deepseek', 'gpt_oss'])
def test_a_mesh_holds_what_one_device_holds(name: str, tmp_path: Path) -> None:
    _, config = MODELS[name]
    # Sizes that two shards divide.
    attention: Any = config.attention
    router = dataclasses.replace(config.moe.router, num_experts=8)  # type: ignore[union-attr]
    config = dataclasses.replace(
        config, vocab_size=32, moe=dataclasses.replace(config.moe, router=router)
    )
    assert attention is not None
    variables = random_variables(config)
    moe.save_pretrained(tmp_path / 'plain', config, variables)
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    _, sharded = moe.load_pretrained(tmp_path / 'plain', mesh=mesh, dtype='float32')
    wanted = moe.variable_shardings(moe.Transformer(config, mesh), mesh)
    assert jax.tree.map(lambda leaf: leaf.sharding, sharded) == wanted
    assert_same_bits(variables, sharded)
    moe.save_pretrained(tmp_path / 'sharded', config, sharded)
    plain, again = (tmp_path / n / 'model.safetensors' for n in ('plain', 'sharded'))
    assert plain.read_bytes() == again.read_bytes()


def test_several_files_and_their_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = random_variables(SMALL)
    moe.save_pretrained(tmp_path, SMALL, variables)
    monkeypatch.setattr(convert, 'MAX_FILE_BYTES', 3000)
    moe.save_pretrained(tmp_path, SMALL, variables)
    files = sorted(tmp_path.glob('*.safetensors'))
    assert len(files) > 2
    assert files[0].name == f'model-00001-of-{len(files):05d}.safetensors'
    # A tensor that is larger by itself has a file of its own.
    sizes = [sum(s.nbytes for s in read_header(file).values()) for file in files]
    alone = [len(read_header(file)) == 1 for file in files]
    assert all(size <= 3000 or single for size, single in zip(sizes, alone, strict=True))
    index = json.loads((tmp_path / 'model.safetensors.index.json').read_text())
    assert index['metadata']['total_size'] == sum(sizes)
    assert {n: f.name for f in files for n in read_header(f)} == index['weight_map']
    assert_same_bits(variables, moe.load_pretrained(tmp_path, dtype='float32')[1])
    files[1].unlink()
    with pytest.raises(InputError, match=f'lacks {files[1].name}'):
        moe.load_pretrained(tmp_path)


def test_dtypes_are_cast_as_asked(folder: Path) -> None:
    config, variables = moe.load_pretrained(folder)
    assert (config.dtype, config.param_dtype) == ('bfloat16', 'bfloat16')
    wanted = jax.tree.map(lambda leaf: leaf.astype('bfloat16'), random_variables(SMALL))
    assert_same_bits(variables, wanted)
    with pytest.raises(InputError, match="'bfloat16'"):
        moe.load_pretrained(folder, dtype='int8')  # type: ignore[arg-type]


def test_everything_wrong_is_named_at_once(folder: Path) -> None:
    prefix = 'model__layers__0__mlp__experts__1__'
    bad = np.zeros((12, 16), np.float32)
    bad[3, 5] = np.nan
    infinite = np.full((16, 12), -np.inf, np.float32)
    change(
        folder,
        **{
            'model__norm__weight': None,
            'model__layers__7__mlp__extra__weight': np.zeros(2, np.float32),
            'model__embed_tokens__weight': np.zeros((16, 29), np.float32),
            'model__layers__2__mlp__gate__weight': np.zeros((6, 16), np.int32),
            f'{prefix}gate_proj__weight': bad,
            f'{prefix}down_proj__weight': infinite,
        },
    )
    with pytest.raises(InputError) as caught:
        moe.load_pretrained(folder, dtype='float32')
    text = str(caught.value)
    for line in (
        'model.norm.weight: is missing; shape (16,)',
        'model.layers.7.mlp.extra.weight: is not of this model',
        'model.embed_tokens.weight: must have shape (29, 16); has (16, 29)',
        'model.layers.2.mlp.gate.weight: is int32',
        'experts.1.gate_proj.weight: has values that are not finite',
        'experts.1.down_proj.weight: has values that are not finite',
        '6 tensors',
    ):
        assert line in text


def test_a_tied_head_may_be_in_the_folder(tmp_path: Path) -> None:
    _, config = MODELS['llama-biases']
    variables = random_variables(config)
    moe.save_pretrained(tmp_path, config, variables)
    change(tmp_path, lm_head__weight=np.zeros((29, 16), np.float32))
    assert_same_bits(variables, moe.load_pretrained(tmp_path, dtype='float32')[1])


def test_cut_off_and_damaged_files(folder: Path) -> None:
    file = folder / 'model.safetensors'
    whole = file.read_bytes()
    header = int.from_bytes(whole[:8], 'little')
    damaged = {
        'empty': b'',
        'cut in the header': whole[:40],
        'cut in the tensors': whole[:-1],
        'longer': whole + b'\0',
        'a header beyond the end': (2**40).to_bytes(8, 'little') + whole[8:],
        'no JSON': whole[:8] + b'[' + whole[9:],
        'another dtype': whole.replace(b'"F32"', b'"F16"', 1),
        'an unknown dtype': whole.replace(b'"F32"', b'"Q99"', 1),
        'a negative size': whole.replace(b'"shape":[29,16]', b'"shape":[-9,16]'),
        'shifted offsets': whole.replace(b'[0,', b'[4,', 1),
    }
    for what, content in damaged.items():
        assert content != whole, what
        file.write_bytes(content)
        with pytest.raises(InputError, match=re.escape(str(file))):
            moe.load_pretrained(folder)
    generator = np.random.default_rng(0)
    for at in generator.integers(0, 8 + header, 60):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << int(generator.integers(8))
        file.write_bytes(flipped)
        try:
            loaded = moe.load_pretrained(folder, dtype='float32')[1]
        except InputError:
            continue
        # A flip in the header's metadata or blanks changes no tensor.
        assert_same_bits(loaded, random_variables(SMALL))


def test_folders_that_are_not_models(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(InputError, match=r'must be a folder with a config\.json'):
        moe.load_pretrained(tmp_path / 'nowhere')
    (folder / 'model.safetensors').rename(folder / 'elsewhere')
    with pytest.raises(InputError, match='there are none'):
        moe.load_pretrained(folder)
    (folder / 'pytorch_model.bin').write_bytes(b'\x80\x04.')
    with pytest.raises(InputError, match=r'pytorch_model\.bin alone.*pickles.*save_pretrained'):
        moe.load_pretrained(folder)
    set_config(folder, model_type='mamba')
    with pytest.raises(InputError, match=r"model_type must be one of llama.*received 'mamba'"):
        moe.load_pretrained(folder)
    (folder / 'config.json').write_text('{')
    with pytest.raises(InputError, match='must be JSON with a model_type'):
        moe.load_pretrained(folder)


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'hidden_act': 'relu'}, "hidden_act must be 'silu'; received 'relu'"),
        ({'rope_parameters': {'rope_type': 'longrope', 'rope_theta': 1e4}}, "'longrope'"),
        ({'rope_parameters': {'rope_type': 'linear', 'rope_theta': 1e4}}, 'a number factor'),
        ({'head_dim': None}, 'must have head_dim'),
        ({'num_experts_per_tok': 9}, 'router.experts_per_token must be at most num_experts=6'),
        ({'quantization_config': {'quant_method': 'gptq'}}, "quant_method='gptq'"),
    ],
)
def test_configs_that_cannot_be_read(values: Any, message: str, folder: Path) -> None:
    set_config(folder, **values)
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        moe.pretrained_config(folder)
    assert 'config.json' in str(caught.value)


def test_kimi_k2_reads_as_deepseek_v3(tmp_path: Path) -> None:
    _, config = MODELS['deepseek']
    moe.save_pretrained(tmp_path, config, random_variables(config))
    set_config(tmp_path, model_type='kimi_k2', architectures=['DeepseekV3ForCausalLM'])
    assert moe.pretrained_config(tmp_path, 'float32') == config


def published(**values: Any) -> dict[str, Any]:
    """What the released configs of different ages have in common."""
    return {
        'vocab_size': 100,
        'hidden_size': 32,
        'intermediate_size': 64,
        'num_hidden_layers': 4,
        'num_attention_heads': 4,
        'num_key_value_heads': 2,
        'rms_norm_eps': 1e-5,
        'max_position_embeddings': 4096,
    } | values


def test_the_first_gemma_says_gelu_and_means_its_approximation(tmp_path: Path) -> None:
    values = published(model_type='gemma', head_dim=8)
    read = []
    for spelling in ('gelu', 'gelu_pytorch_tanh'):
        (tmp_path / 'config.json').write_text(json.dumps(values | {'hidden_act': spelling}))
        read.append(moe.pretrained_config(tmp_path))
    assert read[0] == read[1]
    assert (read[0].activation, read[0].post_norms, read[0].tie_embeddings) == ('gelu', False, True)
    (tmp_path / 'config.json').write_text(json.dumps(values | {'hidden_act': 'relu'}))
    with pytest.raises(InputError, match="hidden_act must be 'gelu_pytorch_tanh' or 'gelu'"):
        moe.pretrained_config(tmp_path)


def test_gemma3_of_images_says_of_its_text_what_differs(tmp_path: Path) -> None:
    """What the 4B model's config.json has of the text, and the one of all that it leaves unsaid."""
    text = {'hidden_size': 2560, 'intermediate_size': 10240, 'num_hidden_layers': 34}
    text |= {'rope_scaling': {'factor': 8.0, 'rope_type': 'linear'}, 'sliding_window': 1024}
    values = {'model_type': 'gemma3', 'text_config': text, 'vision_config': {}}
    (tmp_path / 'config.json').write_text(json.dumps(values))
    read = moe.pretrained_config(tmp_path)
    layers: Any = read.attention_layers
    assert (read.vocab_size, read.norm_eps, read.tie_embeddings) == (262_208, 1e-6, True)
    assert {(a.num_heads, a.num_kv_heads, a.head_dim, a.score_scale) for a in layers} == {
        (8, 4, 256, 256**-0.5)
    }
    assert [a.window for a in layers[4:7]] == [1024, None, 1024]
    assert layers[5].rope_scaling == moe.LinearScaling(8.0)
    assert (layers[5].rope_theta, layers[0].rope_theta) == (1e6, 1e4)


def test_both_spellings_of_experts_and_positions(tmp_path: Path) -> None:
    common = published(model_type='qwen3_moe', head_dim=8, moe_intermediate_size=16)
    common |= {'num_experts_per_tok': 2, 'norm_topk_prob': True}
    yarn = {'factor': 4.0, 'original_max_position_embeddings': 32}
    old = {'num_experts': 8, 'rope_theta': 1e6, 'rope_scaling': yarn | {'type': 'yarn'}}
    new = {
        'num_local_experts': 8,
        'rope_parameters': yarn | {'rope_type': 'yarn', 'rope_theta': 1e6},
    }
    read = []
    for values in (old, new):
        (tmp_path / 'config.json').write_text(json.dumps(common | values))
        read.append(moe.pretrained_config(tmp_path))
    assert read[0] == read[1]
    assert read[0].moe == MoEConfig(RouterConfig(8, 2), 16)
    assert read[0].attention_layers[0].rope_scaling == moe.YarnScaling(4.0, 32)
    assert read[0].attention_layers[0].rope_theta == 1e6


def test_fp8_blocks_are_dequantised(tmp_path: Path) -> None:
    attention = moe.AttentionConfig(4, 4, 40)  # projections of 160 rows: a block and a part of one
    config = dataclasses.replace(model(attention), embed_dim=132, mlp_dim=300, num_layers=1)
    moe.save_pretrained(tmp_path, config, random_variables(config))
    generator = np.random.default_rng(1)
    wanted, changed = {}, {}
    for name, shape in (('self_attn__q_proj', (160, 132)), ('mlp__down_proj', (132, 300))):
        weight = generator.normal(size=shape).astype(ml_dtypes.float8_e4m3fn)
        blocks = tuple(-(-size // 128) for size in shape)
        scale = generator.uniform(0.01, 2, blocks).astype(np.float32)
        key = f'model__layers__0__{name}__weight'
        changed |= {key: weight, f'{key}_scale_inv': scale}
        factors = np.repeat(np.repeat(scale, 128, 0), 128, 1)[: shape[0], : shape[1]]
        wanted[name] = weight.astype(np.float64) * factors
    change(tmp_path, **changed)
    set_config(
        tmp_path, quantization_config={'quant_method': 'fp8', 'weight_block_size': [128, 128]}
    )
    _, variables = moe.load_pretrained(tmp_path, dtype='float32')
    layer = jax.tree.map(lambda leaf: leaf[0], variables['params']['group_0']['layer_0'])
    q = np.asarray(layer['attention']['q']).reshape(132, 160).T
    np.testing.assert_allclose(q, wanted['self_attn__q_proj'], rtol=1e-6)
    np.testing.assert_allclose(layer['mlp']['down'].T, wanted['mlp__down_proj'], rtol=1e-6)
    key = 'model__layers__0__self_attn__q_proj__weight_scale_inv'
    change(tmp_path, **{key: np.ones((1, 2), np.float32)})
    with pytest.raises(InputError, match=r'q_proj\.weight: needs float scales \(2, 2\)'):
        moe.load_pretrained(tmp_path)


def test_mxfp4_groups_are_dequantised(tmp_path: Path) -> None:
    _, config = MODELS['gpt_oss']
    config = dataclasses.replace(
        config, embed_dim=64, moe=dataclasses.replace(config.moe, expert_dim=32)
    )
    moe.save_pretrained(tmp_path, config, random_variables(config))
    generator = np.random.default_rng(2)
    experts, outputs, inputs = 5, 2 * 32, 64
    blocks = generator.integers(0, 256, (experts, outputs, inputs // 32, 16), np.uint8)
    scales = generator.integers(120, 132, (experts, outputs, inputs // 32), np.uint8)
    key = 'model__layers__1__mlp__experts__gate_up_proj'
    change(tmp_path, **{key: None, f'{key}_blocks': blocks, f'{key}_scales': scales})
    # One value at a time, by the bits of E2M1: sign, two of exponent (bias 1), one of mantissa.
    wanted = np.zeros((experts, outputs, inputs))
    for e, o, g, byte in np.ndindex(*blocks.shape):
        for half in range(2):
            bits = int(blocks[e, o, g, byte]) >> 4 * half & 15
            exponent, mantissa = bits >> 1 & 3, bits & 1
            value = (1 + mantissa / 2) * 2 ** (exponent - 1) if exponent else mantissa / 2
            value *= (-1) ** (bits >> 3) * 2.0 ** (int(scales[e, o, g]) - 127)
            wanted[e, o, 32 * g + 2 * byte + half] = value
    _, variables = moe.load_pretrained(tmp_path, dtype='float32')
    gate_up = variables['params']['group_0']['layer_1']['moe']['gate_up'][0]
    np.testing.assert_array_equal(gate_up[:, :, 0], wanted[:, 0::2].swapaxes(1, 2))
    np.testing.assert_array_equal(gate_up[:, :, 1], wanted[:, 1::2].swapaxes(1, 2))


@pytest.mark.parametrize('name', sorted(DTYPES))
def test_files_hold_every_dtype(name: str, tmp_path: Path) -> None:
    array = np.arange(7).astype(DTYPES[name])
    tensors = {'a': array, 'scalar': array[3], 'none': array[:0], 'strided': array[::2]}
    save(tmp_path / 'x.safetensors', tensors)
    for key, value in read(tmp_path / 'x.safetensors').items():
        assert value.dtype == array.dtype
        assert value.shape == tensors[key].shape
        assert value.tobytes() == tensors[key].tobytes()


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'router': RouterConfig(6, 2, selection_bias=True)}, 'moe.router.selection_bias=False'),
        ({'router': RouterConfig(6, 2, choice='expert')}, "moe.router.choice='token'"),
        ({'router': RouterConfig(6, 2, score='sigmoid')}, "moe.router.score='softmax'"),
        ({'shared_dim': 12}, 'moe.shared_dim=0; here 12'),
        ({'bias': True}, 'moe.bias=False; here True'),
    ],
)
def test_students_that_no_family_can_express(change: Any, message: str) -> None:
    assert SMALL.moe is not None
    config = dataclasses.replace(SMALL, moe=dataclasses.replace(SMALL.moe, **change))
    with pytest.raises(InputError, match='nearest, qwen3_moe') as caught:
        moe.family_of(config)
    assert message in str(caught.value)


def test_attention_that_no_family_can_express() -> None:
    linear = moe.LinearAttentionConfig(2, 8, 8, 8)
    for attention, message in (
        (grouped(rope_theta=None), 'rope_theta'),
        ((grouped(), grouped(window=4)), 'attention[1].window'),
        (linear, 'LinearAttentionConfig'),
        (grouped(qkv_bias=True, output_bias=True, qk_norm='full'), 'qk_norm'),
    ):
        with pytest.raises(InputError, match='No published family') as caught:
            moe.family_of(model(attention))
        assert message in str(caught.value)
    wide = dataclasses.replace(MODELS['olmoe'][1], embed_dim=20)
    with pytest.raises(InputError, match=r'attention\.head_dim: embed_dim / attention\.num_heads'):
        moe.family_of(wide)
    # 18 channels and 4 heads: transformers refuses to build such a Llama.
    with pytest.raises(InputError, match=r'embed_dim: a multiple of attention\.num_heads'):
        moe.family_of(dataclasses.replace(model(grouped()), embed_dim=18))


def test_how_a_model_is_computed_is_no_matter() -> None:
    assert SMALL.moe is not None
    router = dataclasses.replace(SMALL.moe.router, jitter=0.1)
    other = dataclasses.replace(SMALL.moe, router=router, dispatch='dense', capacity_factor=2.0)
    config = dataclasses.replace(in_dtype(SMALL, 'bfloat16'), moe=other, remat='full')
    assert moe.family_of(config).model_type == 'qwen3_moe'


@pytest.mark.parametrize('name', ['mixtral-8x7b', 'olmoe-1b-7b', 'qwen3-30b-a3b', 'qwen3-0.6b'])
def test_presets_are_of_their_families(name: str) -> None:
    assert moe.family_of(moe.preset(name)).model_type == name.split('-')[0] + (
        '_moe' if 'a3b' in name else ''
    )


def test_wrong_params_are_named(tmp_path: Path) -> None:
    params = random_variables(SMALL)['params']
    params['final_norm'] = {'scale': jnp.zeros(3)}
    del params['embed']
    with pytest.raises(InputError) as caught:
        moe.save_pretrained(tmp_path, SMALL, params)
    assert 'params/final_norm/scale: required (16,), received (3,)' in str(caught.value)
    assert 'params/embed/embedding: required (29, 16), received none' in str(caught.value)


def test_tokenizer_card_and_context(tmp_path: Path) -> None:
    source = tmp_path / 'tokenizer'
    source.mkdir()
    (source / 'tokenizer.json').write_text(
        json.dumps(
            {
                'model': {'vocab': {'a': 0, 'b': 1}},
                'added_tokens': [{'content': '<s>', 'id': 7}, {'content': '</s>', 'id': 8}],
            }
        )
    )
    (source / 'tokenizer_config.json').write_text(
        json.dumps({'bos_token': '<s>', 'eos_token': {'content': '</s>'}, 'pad_token': None})
    )
    (source / 'secrets.json').write_text('{}')
    folder = tmp_path / 'out'
    variables = random_variables(SMALL)
    moe.save_pretrained(
        folder, SMALL, variables, tokenizer=source, card='# A model\n', context_length=77
    )
    values = json.loads((folder / 'config.json').read_text())
    assert (values['bos_token_id'], values['eos_token_id'], values['pad_token_id']) == (7, 8, None)
    assert values['max_position_embeddings'] == 77
    assert json.loads((folder / 'generation_config.json').read_text())['eos_token_id'] == 8
    assert (folder / 'README.md').read_text() == '# A model\n'
    assert (folder / 'tokenizer.json').read_text() == (source / 'tokenizer.json').read_text()
    assert not (folder / 'secrets.json').exists()
    with pytest.raises(InputError, match=r'tokenizer must be a folder with a tokenizer\.json'):
        moe.save_pretrained(folder, SMALL, variables, tokenizer=tmp_path)


LOAD = """
import sys, tracemalloc
import moe
config, _ = moe.load_pretrained(sys.argv[1], dtype='float32')  # compiles
tracemalloc.start()
config, variables = moe.load_pretrained(sys.argv[1], dtype='float32')
print(tracemalloc.get_traced_memory()[1])
"""


def test_the_host_holds_less_than_twice_the_largest_tensor(tmp_path: Path) -> None:
    """NumPy's and Python's own memory; the parameters themselves are the device's."""
    config = dataclasses.replace(
        SMALL,
        num_layers=1,
        embed_dim=256,
        vocab_size=4096,
        moe=MoEConfig(RouterConfig(6, 2), expert_dim=512),
    )
    moe.save_pretrained(tmp_path, config, random_variables(config))
    largest = max(s.nbytes for s in read_header(tmp_path / 'model.safetensors').values())
    total = (tmp_path / 'model.safetensors').stat().st_size
    assert total > 3 * largest
    run = subprocess.run(
        [sys.executable, '-c', LOAD, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 2 * largest

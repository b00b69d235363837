"""The rivals of `slagen bench`: what reaches the other library, in its layout, and what comes back.

The libraries are stood in for by packages of the same signatures and rules that compute with PyTorch, so that a wrong
layout, list or block size is a wrong result.
"""

import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from slagen.attention import sparse_linear_attention
from slagen.attention.protocol import Unavailable
from slagen.attention.sla.block_map import block_scores, critical_indices
from slagen.attention.sla.config import SLAConfig
from slagen.benchmark import methods, other_libraries
from slagen.benchmark.config import BenchConfig
from slagen.benchmark.methods import Setting
from slagen.benchmark.registry import all_methods
from slagen.settings import settings_of

CUDNN = """
    import torch, torch.nn.functional as F

    class BSA:
        @staticmethod
        def block_sparse_attention_forward(
            q_tensor, k_tensor, v_tensor, q2k_block_index, block_sparse_num=None, block_sizes=None,
            q2k_block_nums=None, *, sparse_block_size=None, allow_empty_block_nums=False, softmax_scale=None,
            pack_gqa=None, layout="bhsd", kv_splits=1, use_clc=None,
        ):
            batch, heads, rows, _ = q_tensor.shape
            columns, block = k_tensor.shape[2], sparse_block_size
            num_columns = -(-columns // block)
            if rows % 64:
                raise NotImplementedError("SM90 forward requires seqlen_q to be a multiple of 64")
            assert q2k_block_index.dtype == block_sizes.dtype == torch.int32
            assert q2k_block_index.shape[:3] == (batch, heads, -(-rows // block))
            assert block_sizes.shape == (num_columns,)
            listed = q2k_block_index[..., :block_sparse_num].long()
            kept = torch.zeros(*listed.shape[:3], num_columns, dtype=torch.bool).scatter_(-1, listed, True)
            mask = kept.repeat_interleave(block, 2)[:, :, :rows].repeat_interleave(block, 3)
            mask &= (torch.arange(block) < block_sizes[:, None]).flatten()
            o = F.scaled_dot_product_attention(q_tensor, k_tensor, v_tensor, mask[..., :columns], scale=softmax_scale)
            return {"o_tensor": o, "lse_tensor": None}
"""
FLASHINFER = """
    import torch, torch.nn.functional as F

    class VariableBlockSparseAttentionWrapper:
        def __init__(self, float_workspace_buffer, backend="auto"):
            assert float_workspace_buffer.dtype == torch.uint8

        def plan(
            self, block_mask_map, block_row_sz, block_col_sz, num_qo_heads, num_kv_heads, head_dim, causal=False,
            pos_encoding_mode="NONE", use_fp16_qk_reduction=False, logits_soft_cap=None, sm_scale=None,
            rope_scale=None, rope_theta=None, non_blocking=True, q_data_type="float16", kv_data_type=None,
        ):
            assert block_mask_map.dtype == torch.bool and num_qo_heads == num_kv_heads == len(block_mask_map)
            assert block_mask_map.shape == (num_kv_heads, block_row_sz.shape[1], block_col_sz.shape[1])
            self.masks = [
                kept.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
                for kept, rows, columns in zip(block_mask_map, block_row_sz, block_col_sz, strict=True)
            ]
            self.dtype = q_data_type

        def run(self, q, k, v, out=None, lse=None, return_lse=False, enable_pdl=None):
            assert q.dtype == self.dtype and q.ndim == 3
            return F.scaled_dot_product_attention(q, k, v, torch.stack(self.masks))

    def single_prefill_with_kv_cache(q, k, v, scale_q=None, scale_k=None, scale_v=None, o_dtype=None, custom_mask=None,
                                     packed_custom_mask=None, causal=False, kv_layout="NHD", **options):
        k, v = (x if kv_layout == "HND" else x.transpose(0, 1) for x in (k, v))
        assert q.shape[1] == k.shape[0]
        return F.scaled_dot_product_attention(q.transpose(0, 1), k, v).transpose(0, 1).contiguous()
"""
CONFIGS = [SLAConfig(0.7, block_m=64, block_n=64), SLAConfig(0.5, block_m=32, block_n=64)]
BLOCKS = ["64x64", "32x64"]


@pytest.fixture
def libraries(tmp_path, monkeypatch):
    for name, source in {"cudnn": CUDNN, "flashinfer": FLASHINFER}.items():
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in ("cudnn", "flashinfer"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def setting(config, head_dim=32, device="cpu", dtype=torch.float32):
    return Setting(config, torch.eye(head_dim), torch.zeros(head_dim), "torch", torch.device(device), dtype)


def draw(length=333, batch=2):
    return torch.randn(3, batch, 3, length, 32, generator=torch.Generator().manual_seed(0)).unbind()


def make(name, config):
    return next(method for method in all_methods() if method.name == name).make(setting(config))


@pytest.mark.parametrize("config", CONFIGS, ids=BLOCKS)
def test_selection_is_the_references(config):
    """Ties too, where every score is equal, and where they are 0 and -0."""
    q, k, _ = draw()
    zero = torch.zeros_like(k)
    zero[:, :, ::2] = -0.0
    for keys in (k, zero, k.round(), k.new_full(k.shape, torch.nan)):
        expected = critical_indices(block_scores(q, keys, config), config)
        assert torch.equal(other_libraries.select(q, keys, config), expected)


class Sizes(TorchDispatchMode):
    """Collects the operators whose result waits for what the device holds."""

    def __init__(self):
        super().__init__()
        self.waiting = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if torch.Tag.data_dependent_output in function.tags or torch.Tag.dynamic_output_shape in function.tags:
            self.waiting.append(str(function))
        return function(*args, **(kwargs or {}))


def test_selection_waits_for_nothing():
    q, k, _ = draw()
    with Sizes() as reference:
        critical_indices(block_scores(q, k, CONFIGS[0]), CONFIGS[0])
    assert reference.waiting  # nonzero: so the test can see it
    with Sizes() as own:
        other_libraries.select(q, k, CONFIGS[0])
        other_libraries.block_sizes(333, 64, q.device)
    assert own.waiting == []


@pytest.mark.parametrize(("length", "sizes"), [(128, [64, 64]), (130, [64, 64, 2]), (1, [1])])
def test_block_sizes(length, sizes):
    assert other_libraries.block_sizes(length, 64, torch.device("cpu")).tolist() == sizes


@pytest.mark.parametrize("length", [333, 320], ids=["ragged", "whole"])
@pytest.mark.parametrize(
    ("name", "config"),
    [("cudnn-blocks", CONFIGS[0]), *(("flashinfer-blocks", config) for config in CONFIGS)],
    ids=["cudnn-64x64", "flashinfer-64x64", "flashinfer-32x64"],
)
def test_block_sparse_rivals_agree_with_the_reference(libraries, name, config, length):
    q, k, v = draw(length)
    expected = sparse_linear_attention(q, k, v, config, backend="reference", branches="sparse")
    assert torch.allclose(make(name, config)(q, k, v), expected, atol=1e-6)


def test_dense_flashinfer_agrees_with_sdpa(libraries):
    q, k, v = draw()
    expected = F.scaled_dot_product_attention(q, k, v)
    assert torch.allclose(make("flashinfer", CONFIGS[0])(q, k, v), expected, atol=1e-6)


def test_what_a_rival_lacks_is_said(libraries):
    with pytest.raises(Unavailable, match="only blocks of 64 x 64 or 128 x 128 are supported, not 32 x 64"):
        make("cudnn-blocks", CONFIGS[1])
    (libraries / "cudnn.py").write_text("")
    sys.modules.pop("cudnn", None)
    with pytest.raises(Unavailable, match="no block-sparse attention in this version.*nvidia-cudnn-frontend"):
        make("cudnn-blocks", CONFIGS[0])


@pytest.mark.parametrize(
    "name", ["cudnn-blocks", "flashinfer-blocks", "flashinfer", "flash-attn", "sage", "sla-public"]
)
def test_rivals_that_are_not_installed(name, monkeypatch):
    monkeypatch.setattr(methods.importlib.util, "find_spec", lambda package: None)
    with pytest.raises(Unavailable, match="not installed"):
        make(name, CONFIGS[0])


@pytest.mark.parametrize("config", CONFIGS, ids=BLOCKS)
def test_flex_gets_the_references_blocks(config, monkeypatch):
    """FlexAttention itself takes a minute to compile; here PyTorch computes what its mask says."""
    from torch.nn.attention import flex_attention as module

    def flex_attention(q, k, v, block_mask, kernel_options):
        assert kernel_options is None and block_mask.q_indices is None  # no backward pass: no transposed lists
        rows, columns = (block_mask.to_dense().bool(), block_mask.BLOCK_SIZE)
        mask = rows.repeat_interleave(columns[0], 2).repeat_interleave(columns[1], 3)
        assert block_mask.seq_lengths == (333, 333)
        return F.scaled_dot_product_attention(q, k, v, mask[:, :, :333, :333])

    monkeypatch.setattr(module, "flex_attention", flex_attention)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    q, k, v = draw()
    expected = sparse_linear_attention(q, k, v, config, backend="reference", branches="sparse")
    with torch.inference_mode():
        assert torch.allclose(make("flex", config)(q, k, v), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("block_m", [16, 32, 64, 128])
@pytest.mark.parametrize("block_n", [16, 32, 64, 128])
def test_flex_tiles_divide_the_blocks(block_m, block_n, dtype):
    """PyTorch raises where they do not: at 64 x 64 on Hopper its own default is 128 x 64."""
    config = SLAConfig(block_m=block_m, block_n=block_n)
    tiles = other_libraries._flex_tiles(setting(config, 128, "cuda", dtype))
    for name, tile in tiles.items():
        of_rows = "BLOCK_M" in name
        assert tile >= 16 and (block_m if of_rows else block_n) % tile == 0
    assert tiles["bwd_BLOCK_M2"] % tiles["bwd_BLOCK_N2"] == 0 == tiles["bwd_BLOCK_N1"] % tiles["bwd_BLOCK_M1"]


def test_the_help_names_every_method_that_runs_by_default():
    told = next(setting.about.help for setting in settings_of(BenchConfig) if setting.field == "methods")
    names = told.removeprefix("Method to measure: ").partition(". ")[0].replace(" or ", ", ").split(", ")
    assert names == [method.name for method in all_methods() if method.by_default]

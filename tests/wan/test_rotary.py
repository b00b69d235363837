"""Norm, rotation and block means in one kernel, against diffusers' own lines in float64."""

import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch
from diffusers.models.transformers import transformer_wan
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor, WanRotaryPosEmbed
from numerics import DRAWS, Rounding, assert_no_worse
from wan_models import build_transformer

pytest.importorskip("triton", reason="needs Triton, which is for Linux")

from triton.runtime.errors import OutOfResources  # noqa: E402

from slagen.attention import registry
from slagen.attention.protocol import Layer  # noqa: E402
from slagen.attention.sla import functional
from slagen.attention.sla.block_map import block_map  # noqa: E402
from slagen.attention.sla.config import SLAConfig  # noqa: E402
from slagen.kernels import rotary as rotary_kernel  # noqa: E402
from slagen.kernels import selection  # noqa: E402
from slagen.kernels.launches import launches  # noqa: E402
from slagen.wan import rotary  # noqa: E402
from slagen.wan.processor import install, make_processor  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.float16, id="fp16"),
    pytest.param(torch.bfloat16, id="bf16", marks=pytest.mark.gpu),  # the interpreter computes bfloat16 wrongly
]


def make_attention(num_heads: int, head_dim: int, dtype: torch.dtype) -> WanAttention:
    """A self-attention layer without gradients, and norms that are far from one."""
    torch.manual_seed(0)
    attn = WanAttention(32, num_heads, head_dim, eps=1e-6).requires_grad_(False)
    for norm in (attn.norm_q, attn.norm_k):
        torch.nn.init.normal_(norm.weight)
    return attn.to(DEVICE, dtype)


def make_tables(length: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Wan's own cos and sin of a clip of `length` frames of one token."""
    return WanRotaryPosEmbed(head_dim, (1, 1, 1), 1024).to(DEVICE)(torch.zeros(1, 4, length, 1, 1, device=DEVICE))


def make_inputs(batch: int, length: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    q, k = (torch.randn(batch, length, width, generator=generator) * 3 for _ in range(2))
    return q.to(DEVICE, dtype), k.to(DEVICE, dtype)


def diffusers_lines(attn, q, k, tables, monkeypatch) -> tuple[torch.Tensor, torch.Tensor]:
    """What diffusers' processor hands to its attention where the projections give q and k."""
    seen = {}

    def attend(query, key, value, **_):
        seen.update(q=query, k=key)
        return value

    with monkeypatch.context() as patch:
        patch.setattr(transformer_wan, "_get_qkv_projections", lambda *_: (q, k, q))
        patch.setattr(transformer_wan, "dispatch_attention_fn", attend)
        WanAttnProcessor()(attn, q, rotary_emb=tables)
    return seen["q"], seen["k"]


def run_kernel(attn, q, k, tables, blocks=None):
    cos, sin = (table[0, :, 0] for table in tables)
    eps = attn.norm_q.eps
    return rotary.norm_rotate(q, k, attn.norm_q.weight, attn.norm_k.weight, cos, sin, attn.heads, eps, blocks)


def drawn_lines(norm, x, tables, dtype) -> torch.Tensor:
    """Runs of diffusers' lines at a dtype, as numerics.py draws them: (DRAWS, B, L, H, D) float64.

    The norm is one operation and the rotation another; each works in float32, and its result is of the dtype.
    """
    wide, step = Rounding(torch.float32), Rounding(dtype)
    x = x.double().cpu().expand(DRAWS, *x.shape)
    squares = wide.sum(x[..., None, :], x[..., :, None])[..., 0]
    scale = wide.result((squares / x.shape[-1] + norm.eps).rsqrt())
    x = step.result(wide.result(x * scale) * norm.weight.double().cpu())
    cos, sin = (table.double().cpu() for table in tables)
    even, odd = x.unflatten(-1, (-1, cos.shape[-1] // 2, 2)).unbind(-1)
    cos, sin = cos[..., ::2], sin[..., 1::2]
    pairs = [
        wide.result(even * cos) - wide.result(odd * sin),
        wide.result(even * sin) + wide.result(odd * cos),
    ]
    return step.result(torch.stack(pairs, -1).flatten(-2))


def check(attn, q, k, tables, monkeypatch) -> None:
    """q, k and the means of blocks of 64 and 16."""
    wide = copy.deepcopy(attn).double()
    exact = diffusers_lines(wide, q.double(), k.double(), [x.double() for x in tables], monkeypatch)
    *found, q_means, k_means = run_kernel(attn, q, k, tables, (64, 16))
    norms = (attn.norm_q, attn.norm_k)
    for name, actual, e, norm, x in zip("qk", found, exact, norms, (q, k), strict=True):
        assert actual.is_contiguous() and actual.dtype == x.dtype, name
        assert_no_worse(name, actual, drawn_lines(norm, x, tables, x.dtype), e.cpu())
    for x, means, block in zip(found, (q_means, k_means), (64, 16), strict=True):
        torch.testing.assert_close(means, selection.pool(x.transpose(1, 2), block), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "length", "num_heads", "head_dim"),
    [(2, 1, 1, 16), (1, 63, 3, 32), (1, 65, 2, 64), (2, 150, 3, 16), (1, 17, 12, 128), (1, 5, 40, 128)],
    ids=lambda value: str(value),
)
def test_is_what_diffusers_computes(batch, length, num_heads, head_dim, dtype, monkeypatch):
    """One token, tails and whole blocks, and heads that are no power of two, of Wan 1.3B and 14B among them."""
    q, k = make_inputs(batch, length, num_heads * head_dim, dtype)
    check(make_attention(num_heads, head_dim, dtype), q, k, make_tables(length, head_dim), monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_strided_input(dtype, monkeypatch):
    """Slices of one fused projection, tokens before batch, columns that are not neighbours, a share of the tables."""
    length, width = 33, 3 * 32
    attn, tables = make_attention(3, 32, dtype), [x[:, 7 : 7 + length] for x in make_tables(50, 32)]
    fused = make_inputs(2, length, 3 * width, dtype)[0]
    q, k, _ = fused.chunk(3, dim=-1)
    check(attn, q, k, tables, monkeypatch)
    q, k = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k))
    check(attn, q, k, tables, monkeypatch)
    check(attn, q.mT.contiguous().mT, k, tables, monkeypatch)


def test_outer_ends_of_the_numbers(monkeypatch):
    """Squares far above 65,504, squares that vanish, zeros, and one channel that outweighs all others."""
    attn, tables = make_attention(3, 32, torch.float16), make_tables(33, 32)
    q, k = make_inputs(1, 33, 96, torch.float16)
    q[:, 0:10] = 1e4 * q[:, 0:10].sign()
    q[:, 10:20] = 0
    k[:, 0:10] *= 1e-5
    k[..., 5] = 6e4
    check(attn, q, k, tables, monkeypatch)
    found = run_kernel(attn, q, k, tables)[0]
    assert not found[:, 10:20].any()


def test_a_nan_stays_in_its_token():
    attn, tables = make_attention(2, 16, torch.float32), make_tables(9, 16)
    q, k = make_inputs(1, 9, 32, torch.float32)
    q[0, 4, 3] = torch.nan
    found = run_kernel(attn, q, k, tables)[0].isnan()
    assert found[0, 4].all() and found.sum() == 32


def test_weights_may_be_of_another_dtype(monkeypatch):
    """Weights in float32 beside tokens in float16; the result is of the tokens' dtype, as in PyTorch."""
    attn, tables = make_attention(2, 16, torch.float16), make_tables(9, 16)
    attn.norm_q.float()
    q, k = make_inputs(1, 9, 32, torch.float16)
    check(attn, q, k, tables, monkeypatch)


# The operator


def test_operator_is_well_registered():
    attn, tables = make_attention(3, 16, torch.float32), make_tables(20, 16)
    q, k = make_inputs(2, 20, 48, torch.float32)
    cos, sin = (table[0, :, 0] for table in tables)
    for blocks in (None, [16, 8]):
        arguments = (q, k, attn.norm_q.weight, attn.norm_k.weight, cos, sin, 3, 1e-6, blocks)
        utils = ("test_schema", "test_faketensor")
        torch.library.opcheck(torch.ops.slagen.norm_rotate.default, arguments, test_utils=utils)


def test_traces_into_one_graph():
    attn, tables = make_attention(2, 16, torch.float32), make_tables(20, 16)
    q, k = make_inputs(1, 20, 32, torch.float32)

    def call(q, k, cos, sin):
        return rotary.norm_and_rotate(attn, q, k, (cos, sin), "triton")

    traced = torch.compile(call, backend="aot_eager", fullgraph=True)(q, k, *tables)[:2]
    kernel = run_kernel(attn, q, k, tables)
    assert all(torch.equal(a, e) for a, e in zip(traced, kernel, strict=False))


# Where it runs


def test_launches_are_on_the_tensors_device(monkeypatch):
    """Triton launches on the current device, which need not be that of q."""
    attn, tables = make_attention(2, 16, torch.float32), make_tables(9, 16)
    q, k = make_inputs(1, 9, 32, torch.float32)
    events = []

    @contextlib.contextmanager
    def device_of(x):
        events.append(x.data_ptr())
        yield
        events.append("left")

    def launch(q, *_):
        events.append("launched")
        return torch.empty(0), torch.empty(1), torch.empty(2), torch.empty(3)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(rotary_kernel, "norm_rotate", launch)
    run_kernel(attn, q, k, tables)
    assert events == [q.data_ptr(), "launched", "left"]


@pytest.fixture
def calls(monkeypatch):
    """The shape of every q that the kernel was given; what was tried before is forgotten."""
    seen = []
    given = rotary.norm_rotate

    def norm_rotate(q, *args):
        seen.append(tuple(q.shape))
        return given(q, *args)

    monkeypatch.setattr(rotary, "norm_rotate", norm_rotate)
    monkeypatch.setattr(rotary, "_works", {})
    return seen


class OnCuda(torch.Tensor):
    """A tensor that says it is on a card, for what is chosen by that."""

    is_cuda = True


def use(backend="triton", dtype=torch.float32, change=lambda attn, q, k, tables: None, head_dim=16) -> bool:
    """Whether norm_and_rotate would take the kernel."""
    attn, tables = make_attention(2, head_dim, dtype), list(make_tables(9, head_dim))
    q, k = make_inputs(1, 9, 2 * head_dim, dtype)
    changed = change(attn, q, k, tables) or (q, k)
    return rotary.fits(attn, *changed, tables, backend)


def test_backends_that_take_the_kernel(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    as_cuda = lambda attn, q, k, tables: (q.as_subclass(OnCuda), k.as_subclass(OnCuda))  # noqa: E731
    assert use("triton") and use("triton", torch.float16)
    assert use("auto", change=as_cuda) and not use("torch", change=as_cuda) and not use("reference", change=as_cuda)
    if DEVICE == "cpu":
        assert not use("auto")


@pytest.mark.parametrize(
    "change",
    [
        lambda attn, q, k, tables: attn.norm_k.requires_grad_(True) and None,
        lambda attn, q, k, tables: (q.requires_grad_(True), k),
        lambda attn, q, k, tables: tables.__setitem__(0, tables[0].half()),
        lambda attn, q, k, tables: tables.__setitem__(1, tables[1][:, :5]),
        lambda attn, q, k, tables: setattr(attn, "norm_q", torch.nn.RMSNorm(32, 1e-6, False)),
        lambda attn, q, k, tables: setattr(attn, "norm_q", torch.nn.LayerNorm(32)),
        lambda attn, q, k, tables: setattr(attn.norm_k, "eps", 1e-5),
        lambda attn, q, k, tables: attn.norm_k.register_forward_hook(print) and None,
        lambda attn, q, k, tables: setattr(attn.norm_q, "forward", print),
        lambda attn, q, k, tables: attn.norm_q.to("meta") and None,
    ],
    ids=[
        "weight-gradient", "gradient", "half-tables", "short-tables", "no-weight", "layer-norm", "two-eps", "hook",
        "forward", "offloaded",
    ],
)  # fmt: skip
def test_what_the_kernel_does_not_take(change):
    assert not use(change=change)


def test_dtypes_and_heads_that_the_kernel_does_not_take():
    assert not use(dtype=torch.float64) and not use(head_dim=48)


def test_autocast_keeps_to_the_lines():
    with torch.autocast(DEVICE, torch.bfloat16):
        assert not use()


def test_a_gradient_that_nobody_wants_is_no_hindrance():
    with torch.no_grad():
        assert use(change=lambda attn, q, k, tables: (q.requires_grad_(True), k))


def test_a_kernel_that_is_wrong_is_not_used(calls, monkeypatch):
    """Told once, and PyTorch's lines run."""
    good = rotary.norm_rotate
    monkeypatch.setattr(rotary, "norm_rotate", lambda q, *args: [x * 1.01 for x in good(q, *args)])
    with pytest.warns(UserWarning, match="fails on .*the result is wrong"):
        assert not use()
    assert not use() and len(calls) == 1


@pytest.mark.parametrize(
    ("error", "said"),
    [
        pytest.param(OutOfResources(300_000, 232_448, "shared memory"), "shared memory", id="too-large"),
        pytest.param(RuntimeError("PassManager::run failed"), "compiler rejects the kernel", id="rejected"),
        pytest.param(RuntimeError("Failed to find C compiler. Please ..."), "no C compiler", id="no-compiler"),
    ],
)
def test_a_kernel_that_does_not_run_on_the_card_is_not_used(calls, monkeypatch, error, said):
    def fail(*_):
        raise error

    monkeypatch.setattr(rotary, "norm_rotate", fail)
    with pytest.warns(UserWarning, match=said):
        assert not use()


def test_a_lack_of_memory_is_no_fault_of_the_kernel(calls, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(rotary, "norm_rotate", fail)
    with pytest.raises(torch.OutOfMemoryError):
        use()


def test_nothing_is_tried_while_a_graph_is_captured(calls, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert use("auto", change=lambda attn, q, k, tables: (q.as_subclass(OnCuda), k.as_subclass(OnCuda)))
    assert calls == []


@pytest.mark.parametrize("config", [None, SLAConfig(sparsity=0.6, block_m=16, block_n=16)], ids=["dense", "sla"])
def test_a_model_makes_the_same(config, calls, monkeypatch):
    """Two layers of Wan with the kernel and with PyTorch's lines, the attention alike."""
    given = []

    def attend(*args, block_means=None):
        given.append(block_means)
        return functional.BACKENDS["torch"](*args)

    monkeypatch.setitem(functional.BACKENDS, "triton", attend)  # in the interpreter far faster
    model = build_transformer(num_heads=3).to(DEVICE)
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "hidden_states": torch.randn(1, 4, 3, 10, 10, generator=generator),
        "encoder_hidden_states": torch.randn(1, 8, 32, generator=generator),
        "timestep": torch.tensor([500.0]),
    }

    install(model, config, backend="triton")

    def run():
        with torch.no_grad():
            return model(**{name: x.to(DEVICE) for name, x in inputs.items()}, return_dict=False)[0]

    actual = run()
    assert calls == [(1, 3, 48)] + [(1, 75, 48)] * 2  # the trial, then both layers
    assert len(given) == (0 if config is None else 2) and None not in given
    monkeypatch.setattr(rotary, "fits", lambda *_: False)
    torch.testing.assert_close(actual, run(), rtol=1e-5, atol=1e-5)
    assert len(calls) == 3


# The means of blocks, for the operator


def test_means_choose_the_same_blocks():
    """As the operator's own do. They are sums of the same numbers in another order, so a block may be another where its
    score is another's but for the rounding of float32, and nowhere else."""
    attn, tables = make_attention(2, 32, torch.float16), make_tables(100, 32)
    q, k, *means = run_kernel(attn, *make_inputs(1, 100, 64, torch.float16), tables, (32, 16))
    own = [selection.pool(x.transpose(1, 2), block) for x, block in ((q, 32), (k, 16))]
    scores, own_scores = (m[0].double() @ m[1].double().mT for m in (means, own))
    config = SLAConfig(0.6, block_m=32, block_n=16)
    found, expected = (block_map(x[None], config)[0] for x in (scores, own_scores))
    border = own_scores.topk(config.num_critical(7)).values[..., -1:]
    assert ((found == expected) | ((own_scores - border).abs() <= 1e-5 * own_scores.abs().amax(-1, keepdim=True))).all()
    assert (found == expected).all(-1).sum() >= 7  # of 8 rows


def layer_launches(config, monkeypatch, change=lambda processor: None, length=150) -> list[str]:
    """The kernels of one self-attention layer of fp16, without gradients, but for its projections."""
    monkeypatch.setattr(rotary, "_is_proven", lambda x: True)
    attn, tables = make_attention(2, 32, torch.float16), make_tables(length, 32)
    attn.to_out[1] = torch.nn.Identity()  # in place of the dropout, which is none
    layer = Layer(0, 1, num_heads=2, head_dim=32)
    processor = make_processor(registry.get("sla"), config, layer, backend="triton").requires_grad_(False)
    change(processor)
    with torch.inference_mode():
        found = launches(lambda: processor(attn, torch.empty(1, length, 32, dtype=torch.float16), rotary_emb=tables))
    return [launch.kernel for launch in found if launch.kernel != "aten.addmm"]


KERNELS = ["norm_rotate_kernel", "key_states_kernel", "aten.bmm", "select_kernel", "combine_kernel", "attend_kernel"]


def test_a_layer_takes_every_mean_once(monkeypatch):
    """Six launches: no kernel pools what the norm and rotation has in hand. Alone the operator launches six itself."""
    assert layer_launches(SLAConfig(0.6, block_m=32, block_n=16), monkeypatch) == KERNELS


def test_a_layer_that_chooses_no_blocks_wants_no_means(monkeypatch):
    config = SLAConfig(0.6, block_m=32, block_n=16)
    seen = []
    given = rotary.norm_rotate
    monkeypatch.setattr(rotary, "norm_rotate", lambda *args: [seen.append(args[-1]), given(*args)][1])
    layer_launches(config, monkeypatch, lambda processor: setattr(processor, "branches", "linear"))
    layer_launches(SLAConfig(0.6, block_m=64, block_n=128), monkeypatch, length=100)  # one key block
    assert seen == [None, None]


def test_a_share_of_the_tokens_has_no_blocks(monkeypatch):
    """Blocks are those of the whole clip, so the operator takes its means after the exchange."""
    group = SimpleNamespace(to_heads=lambda x: x, to_tokens=lambda x: x)
    config = SLAConfig(0.6, block_m=32, block_n=16)
    found = layer_launches(config, monkeypatch, lambda processor: setattr(processor, "token_group", group))
    assert "pool_kernel" in found


@pytest.mark.gpu
def test_is_captured_in_a_cuda_graph():
    attn, tables = make_attention(12, 128, torch.bfloat16), make_tables(300, 128)
    q, k = make_inputs(1, 300, 12 * 128, torch.bfloat16)
    eager = rotary.norm_and_rotate(attn, q, k, tables, "auto")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = rotary.norm_and_rotate(attn, q, k, tables, "auto")
    graph.replay()
    assert all(torch.equal(a, e) for a, e in zip(captured[:2], eager[:2], strict=True))

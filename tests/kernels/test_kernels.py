"""The Triton kernels against the float64 reference, in the interpreter or on a GPU."""

import math

import pytest
import torch
from numerics import assert_within_budget, make_proj, make_qkv, results, strided

pytest.importorskip("triton", reason="needs Triton, which is for Linux")

from slagen import kernels  # noqa: E402
from slagen.attention import sparse_linear_attention  # noqa: E402
from slagen.attention.sla import fused
from slagen.attention.sla.block_map import block_map, block_scores, critical_indices  # noqa: E402
from slagen.attention.sla.config import SLAConfig  # noqa: E402
from slagen.attention.sla.functional import choose_backend  # noqa: E402
from slagen.kernels import forward, resources, selection, states  # noqa: E402

pytestmark = pytest.mark.slow

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = [
    pytest.param(torch.float16, id="fp16"),
    pytest.param(torch.bfloat16, id="bf16", marks=pytest.mark.gpu),  # the interpreter computes bfloat16 wrongly
]
DTYPES = [pytest.param(torch.float32, id="fp32"), *HALF]


def check(shape, dtype, config: SLAConfig, view=lambda x: x, proj: bool = True, branches: str = "both") -> None:
    """Forward and backward are within the error budget, for o and the gradient of every input."""
    inputs = [view(x.to(DEVICE)) for x in make_qkv(shape, dtype)]
    if proj:
        inputs += [x.to(DEVICE) for x in make_proj(shape[3], dtype)]
    do = make_qkv(shape, dtype, seed=2)[0].to(DEVICE)

    def attend(q, k, v, weight=None, bias=None):
        return sparse_linear_attention(q, k, v, config, weight, bias, backend="triton", branches=branches)

    assert_within_budget(results(attend, inputs, do), inputs, do, config, dtype, branches)


DOMAINS = [
    pytest.param({"linear_domain": "all"}, id="all"),
    pytest.param({"linear_domain": "marginal"}, id="marginal"),
    pytest.param({"linear_domain": "marginal", "negligible": 0.3}, id="marginal-negligible"),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("domain", DOMAINS)
def test_numbers(domain, dtype):
    """A tail, three blocks of a size and a length that differ; in one dtype a batch of two."""
    batch = 2 if dtype == torch.float32 else 1
    check((batch, 2, 75, 32), dtype, SLAConfig(sparsity=0.6, block_m=32, block_n=16, **domain))


@pytest.mark.parametrize("domain", DOMAINS[:2])
@pytest.mark.parametrize("feature_map", ["elu", "relu"])
def test_feature_maps(domain, feature_map):
    check((1, 2, 70, 16), torch.float16, SLAConfig(0.6, feature_map=feature_map, block_m=16, block_n=32, **domain))


@pytest.mark.parametrize("length", [1, 15, 16, 17, 33, 64])
def test_tails(length):
    """Shorter than a block, whole blocks, and one token more."""
    for domain in ("all", "marginal"):
        check((1, 1, length, 16), torch.float32, SLAConfig(0.5, linear_domain=domain, block_m=16, block_n=16))


@pytest.mark.parametrize("sparsity", [0.0, 0.99], ids=["all-blocks", "one-block"])
def test_ends_of_sparsity(sparsity):
    """With every block kept no block is marginal, and that linear branch is zero."""
    for domain in ("all", "marginal"):
        check((1, 2, 50, 16), torch.float16, SLAConfig(sparsity, linear_domain=domain, block_m=16, block_n=16))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_head_dimensions(head_dim):
    """Where the state is multiplied with in pieces, and where a tile is smaller than a block."""
    check((1, 1, 70, head_dim), torch.float16, SLAConfig(0.5, block_m=64, block_n=64))


def test_heads_in_groups_change_nothing(monkeypatch):
    """The states of all heads at once would take gigabytes for a long video, so heads are taken a few at a time."""
    q, k, v = (strided(x.to(DEVICE)) for x in make_qkv((2, 3, 40, 16), torch.float32))
    weight, bias = (x.to(DEVICE) for x in make_proj(16, torch.float32))
    config = SLAConfig(0.6, linear_domain="marginal", block_m=16, block_n=16)
    whole = sparse_linear_attention(q, k, v, config, weight, bias, backend="triton")
    monkeypatch.setattr("slagen.kernels.forward.STATES_BYTES", 2 * 3 * 16 * 16 * 4)  # two heads at a time
    grouped = sparse_linear_attention(q, k, v, config, weight, bias, backend="triton")
    assert torch.equal(whole, grouped)


@pytest.mark.parametrize("domain", DOMAINS[:2])
def test_known_means_change_nothing(domain, monkeypatch):
    """To the bit where they are the operator's own, for heads in groups too; other means choose other blocks."""
    q, k, v = (strided(x.to(DEVICE)) for x in make_qkv((1, 2, 40, 16), torch.float32))
    weight, bias = (x.to(DEVICE) for x in make_proj(16, torch.float32))
    config = SLAConfig(0.6, block_m=16, block_n=16, **domain)
    means = selection.pool(q, 16), states.key_states(k, v, 16, "softmax", False, None, pool=True)[0]
    monkeypatch.setattr("slagen.kernels.forward.STATES_BYTES", 1)  # one head at a time

    def attend(block_means):
        return sparse_linear_attention(q, k, v, config, weight, bias, backend="triton", block_means=block_means)

    own = attend(None)
    assert torch.equal(attend(means), own)
    assert not torch.equal(attend((-means[0], means[1])), own)


def test_refuses_means_of_another_size():
    q = torch.zeros(1, 2, 40, 16)
    config, means = SLAConfig(0.6, block_m=16, block_n=16), torch.zeros(2, 3, 16)
    for given, complaint in (((means, means[:, :2]), "of k has"), ((means.half(), means), "of q has")):
        with pytest.raises(
            ValueError, match=f"block_means {complaint} .*must have shape .2, 3, 16. and dtype torch.float32"
        ):
            sparse_linear_attention(q, q, q, config, backend="torch", block_means=given)


def test_marginal_at_head_dimension_256():
    check((1, 1, 40, 256), torch.float32, SLAConfig(0.5, linear_domain="marginal", block_m=16, block_n=32))


def test_blocks_of_128():
    check((1, 1, 300, 16), torch.float16, SLAConfig(0.5, block_m=128, block_n=128))


def test_strided_views():
    """The (B, L, H, D) memory that Wan hands over, and rows that are not contiguous."""
    config = SLAConfig(0.6, block_m=16, block_n=16)
    check((2, 2, 40, 16), torch.float32, config, view=strided)
    check((1, 2, 40, 16), torch.float32, config, view=lambda x: x.mT.contiguous().mT)


@pytest.mark.parametrize("domain", DOMAINS[:2])
def test_weights_of_any_strides(domain):
    """A transposed weight, and a bias that is every other number, or one number for all."""
    config = SLAConfig(0.6, block_m=16, block_n=16, **domain)
    q, k, v = (x.to(DEVICE) for x in make_qkv((1, 1, 40, 16), torch.float32))
    weight, bias = (x.to(DEVICE) for x in make_proj(16, torch.float32))
    for given in (bias.repeat_interleave(2)[::2], bias[:1].expand(16)):
        expected = sparse_linear_attention(q, k, v, config, weight, given.contiguous(), backend="triton")
        found = sparse_linear_attention(q, k, v, config, weight.mT.contiguous().mT, given, backend="triton")
        assert torch.equal(found, expected)


@pytest.mark.parametrize("domain", DOMAINS[:2])
def test_maxima_that_move(domain):
    """Scores grow from key block to key block, by more than what the online softmax lets pass without a rescale."""
    q, k, v = make_qkv((1, 2, 70, 16), torch.float32)
    k = 2 * k.abs() * torch.arange(1, 6).repeat_interleave(16)[:70, None]
    inputs = [x.to(DEVICE) for x in (q.abs(), k, v, *make_proj(16, torch.float32))]
    config = SLAConfig(0.0 if domain["linear_domain"] == "all" else 0.3, block_m=16, block_n=16, **domain)
    do = make_qkv((1, 2, 70, 16), torch.float32, seed=2)[0].to(DEVICE)
    scores = inputs[0] @ inputs[1].mT * 16**-0.5 / math.log(2)
    highest = scores.unflatten(-1, (-1, 14)).amax(-1)  # of five stretches of columns
    assert (highest[..., 1:] - highest[..., :1]).amax(-1).mean() > math.log2(forward.HEADROOM.value)

    def attend(q, k, v, weight, bias):
        return sparse_linear_attention(q, k, v, config, weight, bias, backend="triton")

    assert_within_budget(results(attend, inputs, do), inputs, do, config, torch.float32)


@pytest.mark.parametrize("domain", DOMAINS[:2])
def test_runs_of_several_blocks(domain, monkeypatch):
    """As in every long video, where there are more blocks than programs."""
    monkeypatch.setattr(states, "PROGRAMS", 4)
    check((1, 2, 90, 16), torch.float32, SLAConfig(0.6, block_m=16, block_n=16, **domain))


def test_gradients_under_autocast():
    """Autograd runs the backward under the autocast of whoever asks for gradients; the maths stays in float32."""
    inputs = [x.to(DEVICE) for x in (*make_qkv((1, 1, 40, 16), torch.float32), *make_proj(16, torch.float32))]
    do = make_qkv((1, 1, 40, 16), torch.float32, seed=2)[0].to(DEVICE)

    def attend(q, k, v, weight, bias):
        return sparse_linear_attention(q, k, v, SLAConfig(0.6, block_m=16, block_n=16), weight, bias, backend="triton")

    expected = results(attend, inputs, do)
    with torch.autocast(DEVICE, torch.float16):
        actual = results(attend, inputs, do)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def precisions() -> list[str | None]:
    """What PyTorch says of products of float32, however it was set."""
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:  # it differs from the others
        legacy = None
    backends = torch.backends
    return [legacy, *(x.fp32_precision for x in (backends, backends.cuda.matmul, backends.mkldnn.matmul))]


@pytest.fixture
def default_precision():
    yield
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(lambda backends: None, id="default"),
        pytest.param(lambda backends: torch.set_float32_matmul_precision("high"), id="legacy"),
        pytest.param(lambda backends: setattr(backends, "fp32_precision", "tf32"), id="general"),
        pytest.param(lambda backends: setattr(backends.cuda.matmul, "fp32_precision", "tf32"), id="cuda"),
        pytest.param(
            lambda backends: (
                setattr(backends.cuda.matmul, "fp32_precision", "tf32"),
                setattr(backends.mkldnn.matmul, "fp32_precision", "bf16"),
            ),
            id="apart",
        ),
    ],
)
def test_products_are_exact_where_the_caller_allows_tf32(given, default_precision, monkeypatch):
    """PyTorch's products choose the blocks, in float32, forward and backward, on the tensors' device; the caller's
    settings are as before."""
    seen = []

    def spy(name, function):
        def call(*args, **options):
            seen.append((name, torch.backends.cuda.matmul.fp32_precision, torch.get_float32_matmul_precision()))
            return function(*args, **options)

        return call

    devices = []
    real = fused._on_device
    monkeypatch.setattr(fused, "_on_device", lambda x: devices.append(x.device) or real(x))
    for name in ("sla_forward", "sla_backward"):
        monkeypatch.setattr(kernels, name, spy(name, getattr(kernels, name)))
    given(torch.backends)
    before = precisions()
    q = make_qkv((1, 1, 16, 16), torch.float32)[0].to(DEVICE).requires_grad_()
    sparse_linear_attention(q, q, q, SLAConfig(0.5, block_m=16, block_n=16), backend="triton").sum().backward()
    assert [name for name, *_ in seen] == ["sla_forward", "sla_backward"] and devices == [q.device] * 2
    assert all(new in ("none", "ieee") and legacy == "highest" for _, new, legacy in seen)
    assert precisions() == before
    if before[1] == "tf32":  # what followed the general setting still does
        torch.backends.fp32_precision = "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"


def test_refuses_rows_of_too_many_blocks():
    """The scan of a row must fit the shared memory of the smallest card."""
    with pytest.raises(ValueError, match="8,193 key blocks.*at most 8,192. Use larger blocks"):
        selection.select(torch.empty(1, 1, 8193), 1, 0, classes=False)


def test_without_projection():
    check((1, 2, 60, 32), torch.float16, SLAConfig(0.6, block_m=16, block_n=16), proj=False)


@pytest.mark.parametrize("branches", ["sparse", "linear"])
@pytest.mark.parametrize("domain", DOMAINS[:2])
def test_one_branch(domain, branches):
    check((1, 2, 60, 16), torch.float32, SLAConfig(0.6, block_m=16, block_n=16, **domain), branches=branches)


def test_long_sums_stay_finite_in_float16():
    """elu over many equal tokens: the plain sum of phi(k)^T v would pass 65,504."""
    length = 2048
    k = torch.full((1, 1, length, 16), 6.0, dtype=torch.float16, device=DEVICE)
    q = torch.randn(k.shape, generator=torch.Generator().manual_seed(0)).half().to(DEVICE)
    weight = torch.eye(16, device=DEVICE)
    for domain in ("all", "marginal"):
        config = SLAConfig(0.9, linear_domain=domain, feature_map="elu", block_m=128, block_n=128)
        o = sparse_linear_attention(q, k, k, config, weight, backend="triton")
        torch.testing.assert_close(o.float(), torch.full_like(o, 12.0).float(), rtol=2e-3, atol=0)


def test_backward_is_repeatable():
    config = SLAConfig(0.5, linear_domain="marginal", block_m=16, block_n=16)
    inputs = [x.to(DEVICE) for x in (*make_qkv((1, 2, 60, 16), torch.float32), *make_proj(16, torch.float32))]

    def attend(q, k, v, weight, bias):
        return sparse_linear_attention(q, k, v, config, weight, bias, backend="triton")

    do = torch.ones(1, 2, 60, 16, device=DEVICE)
    first, second = results(attend, inputs, do), results(attend, inputs, do)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# The selection


@pytest.mark.parametrize("columns", [5, 1030], ids=["one-step", "two-steps"])
def test_selection_is_that_of_the_reference(columns):
    """Ties, infinities, nan and both zeros included; the lists turn round to the columns' own."""
    generator = torch.Generator().manual_seed(columns)
    scores = torch.randn(3, 7, columns, generator=generator)
    scores[1] = scores[1].round()  # many equal scores
    scores[2, 0] = -scores[2, 0].abs()
    scores[2, 1, :4] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf])
    scores[2, 2, 1] = torch.nan
    config = SLAConfig(sparsity=0.7, negligible=0.2, linear_domain="marginal", block_m=16, block_n=16)
    critical, negligible = config.num_critical(columns), config.num_negligible(columns)
    scores[2, 3] = -1.0  # both zeros stand where the last critical block is chosen, the negative one first
    scores[2, 3, : critical - 1] = 1.0
    scores[2, 3, critical - 1 : critical + 1] = torch.tensor([-0.0, 0.0])
    kv_indices, classes = selection.select(scores.to(DEVICE), critical, negligible, classes=True)
    clean = scores.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)[None]
    assert torch.equal(classes.cpu(), block_map(clean, config)[0])
    assert torch.equal(kv_indices.cpu().long(), critical_indices(clean, config)[0])
    q_indices, q_offsets = selection.column_lists(classes, critical)
    for head in range(3):
        for column in range(columns):
            rows = q_indices[head, q_offsets[head, column] : q_offsets[head, column + 1]].cpu()
            assert torch.equal(rows.long(), (classes[head, :, column].cpu() == 1).nonzero()[:, 0])


def test_selects_the_blocks_of_the_torch_backend():
    q, k, _ = make_qkv((2, 3, 200, 16), torch.float32)
    config = SLAConfig(0.7, block_m=32, block_n=16)
    scores = torch.bmm(selection.pool(q.to(DEVICE), 32), selection.pool(k.to(DEVICE), 16).mT)
    kv_indices, _ = selection.select(scores, 3, 0, classes=False)
    expected = critical_indices(block_scores(q, k, config), config)
    assert torch.equal(kv_indices.cpu().view(2, 3, 7, -1)[..., :3].long(), expected[..., :3])


# Where the kernels may run


def test_cpu_tensors_need_the_interpreter(monkeypatch):
    q = torch.zeros(1, 1, 16, 16)
    monkeypatch.setattr(resources, "interpreting", lambda: False)
    with pytest.raises(ValueError, match="on cpu, and Triton needs a CUDA device.*Try torch or auto"):
        choose_backend(q, "triton")
    assert choose_backend(q) == "torch"


@pytest.mark.parametrize(
    ("q", "complaint"),
    [
        (torch.zeros(1, 1, 16, 16, dtype=torch.float64), "not torch.float64"),
        (torch.zeros(1, 1, 16, 48), "16, 32, 64, 128, 256, not 48"),
    ],
    ids=["float64", "head-dim-48"],
)
def test_refuses_what_it_cannot_compute(q, complaint):
    with pytest.raises(ValueError, match=complaint):
        sparse_linear_attention(q, q, q, SLAConfig(), backend="triton")


def test_operator_is_well_registered():
    """Fake shapes and autograd hold, so that torch.compile and CUDA graphs can take the operator as it is."""
    drawn = (*make_qkv((1, 2, 40, 16), torch.float32), *make_proj(16, torch.float32))
    q, k, v, weight, bias = (x.to(DEVICE).requires_grad_() for x in drawn)
    for domain, sparse in (("all", True), ("marginal", True), ("marginal", False)):
        arguments = (q, k, v, weight, bias, 0.6, 0.0, domain, "softmax", 16, 16, 0.25, sparse, True)
        if domain == "all":
            arguments += (selection.pool(q, 16), selection.pool(k, 16))
        torch.library.opcheck(
            torch.ops.slagen.sla_forward.default, arguments, test_utils=("test_schema", "test_faketensor")
        )


def test_traces_into_one_graph():
    """Nothing around the operator breaks torch.compile's graph, forward or backward."""
    config = SLAConfig(0.6, block_m=16, block_n=16)
    inputs = [x.to(DEVICE) for x in (*make_qkv((1, 2, 40, 16), torch.float32), *make_proj(16, torch.float32))]

    def attend(q, k, v, weight, bias):
        return sparse_linear_attention(q, k, v, config, weight, bias, backend="triton")

    do = torch.ones(1, 2, 40, 16, device=DEVICE)
    traced = results(torch.compile(attend, backend="aot_eager", fullgraph=True), inputs, do)
    for a, e in zip(traced, results(attend, inputs, do), strict=True):
        assert torch.equal(a, e)


@pytest.mark.gpu
def test_compiles_into_one_graph():
    config = SLAConfig(0.6, block_m=64, block_n=64)
    q, k, v = (x.cuda() for x in make_qkv((1, 2, 300, 64), torch.bfloat16))
    weight, bias = (x.cuda() for x in make_proj(64, torch.float32))
    eager = sparse_linear_attention(q, k, v, config, weight, bias)
    attend = torch.compile(sparse_linear_attention, fullgraph=True)
    assert torch.equal(attend(q, k, v, config, weight, bias), eager)


@pytest.mark.gpu
def test_is_captured_in_a_cuda_graph():
    config = SLAConfig(0.6, block_m=64, block_n=64)
    q, k, v = (x.cuda() for x in make_qkv((1, 2, 300, 64), torch.bfloat16))
    weight, bias = (x.cuda() for x in make_proj(64, torch.float32))
    eager = sparse_linear_attention(q, k, v, config, weight, bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = sparse_linear_attention(q, k, v, config, weight, bias)
    graph.replay()
    assert torch.equal(o, eager)

"""linear_few: every home against fp64, ragged shapes, rows of wider buffers, outputs written or added to."""

import pytest
import torch

from csrc_free_kernels import launch
from csrc_free_kernels.gpu.linear_few import DEFAULT
from csrc_free_kernels.reference.linear_few import linear_few as reference
from tests.helpers.homes import DEVICE, homes, poison
from tests.helpers.tolerance import assert_close

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# name: M, N, K, dtype
CASES = {
    "one-row": (1, 80, 96, FP32),
    "ragged-k": (3, 80, 136, FP32),
    "one-channel-over": (16, 33, 257, FP32),
    "less-than-a-block": (2, 5, 7, FP32),
    "bf16-one-row": (1, 80, 136, BF16),
    "bf16": (3, 96, 256, BF16),
    "bf16-full": (16, 80, 520, BF16),
    "fp16": (16, 80, 96, FP16),
    "tiles": (3, 1100, 40, FP32),  # more than one of the CPU's
}


def inputs(M, N, K, dtype):
    """x and weight are strided rows of wider buffers whose other columns are NaN."""
    x, weight = torch.full((M, K + 8), float("nan")), torch.full((N, K + 8), float("nan"))
    x[:, :K], weight[:, :K] = torch.randn(M, K), torch.randn(N, K)
    return x.to(dtype)[:, :K], weight.to(dtype)[:, :K]


def run(fn, device, x, weight, before=None):
    """Call `fn` with part of a poisoned buffer; only that part may change."""
    wide = poison(x.shape[0] + 1, weight.shape[0] + 8, dtype=x.dtype, device=device)
    out = wide[:-1, :-8]
    if before is not None:
        out.copy_(before)
    # a move to another device would make them contiguous
    x, weight = (
        torch.nn.functional.pad(t, (0, 8), value=float("nan")).to(device)[:, :-8] for t in (x, weight)
    )
    fn(x, weight, out, add=before is not None)
    assert wide[-1].isnan().all() and wide[:, -8:].isnan().all()
    return out


@pytest.mark.parametrize("add", [False, True], ids=["written", "added"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("fn", "device"), homes("linear_few"))
def test_matches_reference(fn, device, case, add):
    x, weight = inputs(*CASES[case])
    before = torch.randn(x.shape[0], weight.shape[0]).to(x.dtype) if add else None
    truth = x.double() @ weight.double().T + (before.double() if add else 0)
    assert_close(run(fn, device, x, weight, before), truth, run(reference, "cpu", x, weight, before), x.dtype)


@pytest.mark.parametrize(("fn", "device"), homes("linear_few"))
def test_the_sum_is_rounded_once(fn, device):
    """257 is no bf16 number: rounded ahead of the add it would be 256, and the result 0."""
    x, weight = torch.ones(1, 257, dtype=BF16), torch.ones(1, 257, dtype=BF16)
    assert run(fn, device, x, weight, torch.tensor([[-256.0]], dtype=BF16)).item() == 1


@pytest.mark.parametrize(("fn", "device"), homes("linear_few"))
def test_what_does_not_fit_is_refused(fn, device):
    with pytest.raises(ValueError, match="17 rows"):
        run(fn, device, *inputs(17, 16, 16, FP32))
    x, weight = inputs(1, 16, 16, FP32)
    with pytest.raises(ValueError, match="bfloat16"):
        run(fn, device, x, weight.bfloat16())


def test_triton_refuses_a_strided_last_dim():
    fn = homes("linear_few")[0].values[0]
    with pytest.raises(ValueError, match="contiguous"):
        fn(*(torch.zeros(16, 16, device=DEVICE).T for _ in range(3)), add=False)


@pytest.mark.parametrize("config", [(16, 256, 4, 4), (64, 128, 8, 2)])
def test_configurations_of_the_table_are_used(config, monkeypatch):
    """The entry of the shape up to its rows, else the default; the result is the same."""
    from csrc_free_kernels.gpu import linear_few as module

    launched = []

    class Spy:
        def __getitem__(self, grid):
            return lambda *args, **kw: (launched.append(kw), kernel[grid](*args, **kw))

    kernel = module.linear_few_kernel
    monkeypatch.setattr(module, "linear_few_kernel", Spy())
    use = dict(zip(("block_n", "block_k", "num_warps", "num_stages"), config, strict=True)) | {"max_rows": 3}
    for rows in (3, 4):
        x, weight = inputs(rows, 80, 136, FP32)
        with launch.candidate("linear_few", torch.device(DEVICE), 0, {"n": 80, "k": 136, "itemsize": 4}, use):
            out = run(module.linear_few, DEVICE, x, weight)
        assert_close(out, x.double() @ weight.double().T, None, FP32)
    found = [tuple(kw[n] for n in ("BLOCK_N", "BLOCK_K", "num_warps", "num_stages")) for kw in launched]
    assert found == [config, DEFAULT]


def test_where_the_table_says_nothing_torch_does_it():
    device = torch.device(DEVICE)
    features = {"n": 80, "k": 136, "itemsize": 2}
    use = {"block_n": 16, "block_k": 64, "num_warps": 4, "num_stages": 3, "max_rows": 8}
    assert launch.few_rows_config(80, 136, 1, 2, device) is None
    with launch.candidate("linear_few", device, 0, features, use):
        assert launch.few_rows_config(80, 136, 8, 2, device) == (16, 64, 4, 3)
        for n, k, rows, itemsize in ((80, 136, 9, 2), (80, 136, 1, 4), (136, 80, 1, 2), (80, 136, 17, 2)):
            assert launch.few_rows_config(n, k, rows, itemsize, device) is None
    assert launch.few_rows_config(80, 136, 1, 2, device) is None


def test_entries_in_the_table_can_be_launched():
    """Powers of two, rows that the op takes; `test_compile` compiles them."""
    entries = [e for e in launch.entries() if e["op"] == "linear_few"]
    assert entries
    for e in entries:
        assert set(e["features"]) == {"n", "k", "itemsize"} and 1 <= e["use"]["max_rows"] <= launch.FEW_ROWS
        assert all(v & (v - 1) == 0 for n, v in e["use"].items() if n.startswith("block") or n == "num_warps")

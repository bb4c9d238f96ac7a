"""The suites behind the targets: subjects, controlled selection, lent pages, arithmetic, and every suite in small."""

import numpy as np
import pytest
import torch

from bench import step_sweep
from bench.__main__ import QUICK_OVERRIDES, _one_thread, main
from bench.breakdown import Kernel, parts_of, union
from bench.dense import IMPLEMENTATIONS
from bench.gate import dense_gate, gate
from bench.graphed import DenseGraph, DenseGraphStock, NoAttentionGraph
from bench.lab import QUICK, Lab, Measured, met
from bench.ours import AllResident, FetchThenAttend, Rheo, RheoEager
from bench.recorded import Recording
from bench.schema import read_rows
from bench.selectors import Flat, Frozen, drop_kernel, drop_on_host
from bench.shapes import quick_config, random_model, view
from bench.suites import SUITES, memory, misses, resident
from bench.timing import Quantiles, Rates
from csrc_free_kernels import launch
from rheo_offload.config import RheoConfig, resolve_auto
from tests.helpers.homes import DEVICE

CPU = torch.device("cpu")
SIZE, BUDGET_BLOCKS, RECENT, LAYERS, HEADS = 16, 4, 1, 3, 2
CONTEXT = 256


def config_of(*overrides: str) -> RheoConfig:
    return RheoConfig().with_overrides([*QUICK_OVERRIDES, "audit.every=0", *overrides])


@pytest.fixture(autouse=True)
def one_thread():
    """Shapes this small only lose by more."""
    with _one_thread():
        yield


@pytest.fixture
def traces(tmp_path):
    """Two recordings of made-up streams that fit the quick shape: the sets change at every step."""
    rng = np.random.default_rng(3)
    blocks, steps, streams = CONTEXT // SIZE, 40, 7
    for name in ("s64-heat", "s64-noheat"):
        base = np.zeros((streams, steps, BUDGET_BLOCKS), np.uint16)
        base[..., -1] = blocks - 1
        for at in np.ndindex(streams, steps):
            base[at][1:-1] = np.sort(rng.choice(np.arange(1, blocks - 1), BUDGET_BLOCKS - 2, replace=False))
        order = np.stack([rng.permutation(blocks - 2) for _ in range(streams)]).astype(np.uint16)
        meta = dict(
            format=1, start_tokens=CONTEXT - steps, block_size=SIZE, sink_blocks=1, recent_blocks=RECENT,
            query_blocks=2, agnostic_blocks=0, heat_decay=0.98, streams=[[0, 0, i] for i in range(streams)],
        )  # fmt: skip
        Recording(base=base, early=base[:, :, :0], start_order=order, meta=meta).save(
            tmp_path / f"{name}.npz"
        )
    return tmp_path


@pytest.fixture
def lab(traces):
    rows = []
    lab = Lab(
        model=random_model(quick_config(), CPU, torch.float32),
        model_name="quick",
        config=config_of(),
        rates=Rates(memory=1e9, link=1e8),
        scale=QUICK,
        traces=traces,
        emit=rows.append,
    )
    lab.rows = rows  # type: ignore[attr-defined]
    with torch.inference_mode():
        yield lab
        lab.close()


def selections_of(subject: Rheo) -> list[list[torch.Tensor]]:
    """Record what `decide` selects: the returned list gets one tensor per layer and step."""
    seen: list[torch.Tensor] = []
    ops = subject.executor.ops
    real = ops.decide

    def decide(*args, **kwargs):
        real(*args, **kwargs)
        seen.append(args[14].clone())  # selected_blocks

    ops.decide = decide
    return seen


# ---- subjects ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sdpa", "paged"])
@pytest.mark.parametrize("fused", ["off", "on"])
def test_dense_graph_decodes_the_tokens_of_stock(name, fused, monkeypatch):
    model = random_model(quick_config(), CPU, torch.float32)
    monkeypatch.setattr(DenseGraph, "fused", fused)
    ids = torch.randint(512, (2, 70))
    with torch.inference_mode():
        wanted = ids
        for _ in range(5):
            wanted = torch.cat([wanted, view(model, "eager")(wanted).logits[:, -1:].argmax(-1)], 1)
        subject = DenseGraph(model, implementation=name)
        subject.start(ids, fill="prefill", max_length=75)
        tokens = []
        for _ in range(5):
            subject.step()
            tokens.append(subject.tokens())
        assert torch.equal(torch.cat(tokens, 1), wanted[:, 70:])
        assert subject.note == f"attention={name}"
        assert subject.device_kv_bytes() == 2 * LAYERS * 2 * HEADS * 128 * 32 * 4


def test_implementations_ignore_what_lies_beyond_the_length():
    heads, tokens, dim, rows = 2, 128, 32, 2
    q, k, v = (
        torch.randn(rows, 8, 1, dim),
        torch.randn(rows, heads, tokens, dim),
        torch.randn(rows, heads, tokens, dim),
    )
    lens = torch.tensor([65, 128], dtype=torch.int32)
    wanted = []
    for row in range(rows):
        keys, values = (t[row, :, : lens[row]].double().repeat_interleave(4, 0) for t in (k, v))
        weights = (q[row].double() @ keys.mT * 0.2).softmax(-1)
        wanted.append(weights @ values)
        k[row, :, lens[row] :] = 1e3
        v[row, :, lens[row] :] = float("nan")  # sdpa multiplies what it masks: finite there
    mask = torch.arange(tokens) < lens[:, None, None, None]
    for name, kind in IMPLEMENTATIONS.items():
        if name == "flash":
            continue
        attention = kind(rows, 8, (heads, tokens, dim), k)
        values = v if name == "paged" else v.nan_to_num(1e3)
        got = attention(q, k, values, lens, mask, 0.2)
        assert torch.allclose(got[:, 0].double(), torch.stack(wanted)[:, :, 0], atol=1e-4), name


def test_the_gates_pass_on_the_cpu_and_see_a_wrong_peer(monkeypatch):
    config = resolve_auto(config_of(), context_len_tokens=CONTEXT, device_type="cpu")
    assert gate(quick_config(), config, CPU, 2) == ""
    assert dense_gate(quick_config(), config, CPU, 2) == ""
    real = IMPLEMENTATIONS["paged"].__call__
    monkeypatch.setattr(IMPLEMENTATIONS["paged"], "__call__", lambda *args: real(*args) * 0.5)
    assert "paged" in dense_gate(quick_config(), config, CPU, 2)


def test_variants_of_ours_differ_as_their_names_say(lab):
    with (
        lab.ours(Rheo.name, 1, CONTEXT) as rheo,
        lab.ours(AllResident.name, 1, CONTEXT) as resident_,
        lab.ours(FetchThenAttend.name, 1, CONTEXT) as peer,
        lab.ours(RheoEager.name, 1, CONTEXT) as eager,
    ):
        blocks = rheo.executor.cache.max_blocks
        found = [s.executor.cache.capacity for s in (rheo, resident_, peer, eager)]
        assert found == [BUDGET_BLOCKS + 1, blocks, BUDGET_BLOCKS + 1, BUDGET_BLOCKS + 1]
        assert (peer.config.prefetch.overlap, rheo.config.prefetch.overlap) == (False, True)
        assert (eager.stepper.runner.enabled, rheo.stepper.runner.enabled) == (False, True)
        for _ in range(3):
            for subject in (rheo, resident_, peer, eager):
                subject.step()
        assert torch.equal(rheo.tokens(), eager.tokens())
        assert resident_.stats()["miss_blocks"] == 0


def test_a_graph_without_attention_moves_its_position():
    model = random_model(quick_config(), CPU, torch.float32)
    subject = NoAttentionGraph(model)
    with torch.inference_mode():
        subject.start(torch.randint(512, (2, 9)), fill="random", max_length=20)
        before = subject.positions.clone(), subject.positions.data_ptr()
        subject.step()
        assert torch.equal(subject.positions, before[0] + 1) and subject.positions.data_ptr() == before[1]


# ---- controlled selection ----------------------------------------------------------------------------------


def test_frozen_ids_are_what_is_selected(lab):
    selection = Frozen()
    with lab.ours(Rheo.name, 2, CONTEXT, selection, warm=False) as subject:
        seen = selections_of(subject)
        scored = []
        inner = subject.executor.selector.inner
        subject.executor.selector.inner = _Spy(inner, scored)
        for _ in range(SIZE + 3):  # the tail moves to another block meanwhile
            subject.step()
        assert len(scored) == len(seen) == LAYERS * (SIZE + 3), (
            "the real scoring runs in every layer and step"
        )
        for step in range(SIZE + 3):
            tail = (CONTEXT + step) // SIZE
            for layer in range(LAYERS):
                ids = selection.ids[layer]
                forced = torch.tensor([0, tail], dtype=torch.int32).expand(2, HEADS, 2)
                wanted = torch.cat([forced[..., :1], ids, forced[..., 1:]], -1)
                assert torch.equal(seen[step * LAYERS + layer], wanted)
        assert len({tuple(row) for row in selection.ids.flatten(0, 2).tolist()}) > LAYERS, "heads differ"
        assert subject.stats()["miss_blocks"] == 2 * HEADS * LAYERS * 3, (
            "the first step misses all but the tail"
        )


class _Spy:
    def __init__(self, inner, calls):
        self.inner, self.calls = inner, calls

    def score(self, ops, q, *tensors, **kwargs):
        self.calls.append(tensors[-1])
        tensors[-1].fill_(float("nan"))
        self.inner.score(ops, q, *tensors, **kwargs)
        assert not tensors[-1].isnan().any(), "the method wrote its scores"


def test_recorded_ids_follow_the_recording(lab):
    selection = lab.recorded("s64-heat")
    recording = selection.recording
    with lab.ours(Rheo.name, 2, CONTEXT, selection) as subject:
        seen = selections_of(subject)
        steps = 7
        for _ in range(steps):
            subject.step()
        ids = torch.from_numpy(recording.ids(LAYERS, HEADS, 2, selection.num_steps))
        for step in range(steps):
            wanted = ids[step].clone()
            wanted[..., -RECENT:] = (CONTEXT + step) // SIZE  # the run's own last block
            assert torch.equal(torch.stack(seen[step * LAYERS : (step + 1) * LAYERS]), wanted)
        assert len({str(s.tolist()) for s in seen}) > LAYERS, "it changes"


def test_a_recording_warms_the_pools_with_its_hottest_blocks(lab):
    selection = lab.recorded("s64-heat")
    with lab.ours(Rheo.name, 1, CONTEXT, selection) as subject:
        recording = selection.recording
        stream = recording.stream_map(LAYERS, HEADS, 1)
        for number, layer in enumerate(subject.executor.cache.full.values()):
            for head in range(HEADS):
                resident_ = set((layer.slot_of[0, head] >= 0).nonzero().flatten().tolist())
                order = recording.start_order[stream[number, 0, head]].tolist()
                hottest = [b for b in order if b != 0][: layer.capacity - 1 - 2]
                assert resident_ == {0, CONTEXT // SIZE - 1, *hottest}


def test_recordings_of_another_shape_are_refused_by_name(lab):
    with pytest.raises(ValueError, match="the recording has 4 blocks of 16"):  # noqa: SIM117
        with lab.ours(
            Rheo.name, 1, CONTEXT, lab.recorded("s64-heat"), overrides=("selection.token_budget=96",)
        ):
            pass
    with pytest.raises(ValueError, match="16 blocks of the recording"):  # noqa: SIM117
        with lab.ours(Rheo.name, 1, CONTEXT // 2, lab.recorded("s64-heat")):
            pass


def test_forced_misses_reach_their_rate(lab):
    selection = Frozen(forced_misses=True)
    with lab.ours(Rheo.name, 8, CONTEXT, selection, warm=False) as subject:
        for rate in (0.0, 0.2, 0.5):
            selection.set_miss_rate(rate)
            subject.step()  # what the rate before it dropped is back
            subject.step()
            before = subject.stats()
            for _ in range(12):
                subject.step()
            after = subject.stats()
            missed, selected = (after[k] - before[k] for k in ("miss_blocks", "selected_blocks"))
            assert missed / selected == pytest.approx(rate, abs=0.03)
            assert after["h2d_bytes"] - before["h2d_bytes"] == missed * 2 * SIZE * 32 * 4
            subject.executor.cache.check_integrity()
        with pytest.raises(ValueError, match=r"0\.9"):
            selection.set_miss_rate(0.9)


def test_the_drop_kernel_drops_what_the_host_drops():
    rows, heads, blocks, count = 2, 3, 20, 5
    generator = torch.Generator().manual_seed(0)
    ids = torch.rand(rows, heads, blocks, generator=generator).topk(count, -1).indices.sort(-1).values.int()
    slot_of = torch.randperm(rows * heads * blocks, generator=generator).int().view(rows, heads, blocks)
    slot_of[torch.rand(slot_of.shape, generator=generator) < 0.3] = -1
    block_in = torch.full((rows * heads * blocks,), -1, dtype=torch.int32)
    for b, h, n in (slot_of >= 0).nonzero().tolist():
        block_in[slot_of[b, h, n]] = n
    steps, dropped = torch.tensor([12345]), []
    for rate in (0.0, 0.5, 1.0):
        tables = [(slot_of.clone(), block_in.clone()) for _ in range(2)]
        drop_on_host(ids, *tables[0], steps, torch.tensor([rate]), 3)
        there = [t.to(DEVICE) for t in (ids, *tables[1], steps, torch.tensor([rate]))]
        drop_kernel[(rows * heads,)](*there, 3, *slot_of.stride()[:2], HKV=heads, K=count, K_P=8)
        assert torch.equal(tables[0][0], there[1].cpu()) and torch.equal(tables[0][1], there[2].cpu())
        gone = (tables[0][0] == -1) & (slot_of != -1)
        assert int((block_in != tables[0][1]).sum()) == int(gone.sum())
        dropped.append(int(gone.sum()))
    resident_ = int((slot_of.gather(-1, ids.long()) >= 0).sum())
    assert dropped[0] == 0 < dropped[1] < dropped[2] == resident_


# ---- lent pages --------------------------------------------------------------------------------------------


def test_lent_pages_hold_what_summaries_say_and_come_back(lab):
    with lab.ours(Rheo.name, 2, CONTEXT) as subject:
        kv = subject.executor.cache
        kv.check_integrity()
        assert kv.lengths == [CONTEXT] * 2 and len(set(kv.pages[0] + kv.pages[1])) == len(kv.pages[0]) * 2
        layer = kv.full[1]
        page = kv.pages[1][3]
        mean = layer.k_host[page].float().mean(1)
        assert mean.abs().sum() > 0
        assert torch.allclose(layer.summary[page, :, 0], mean, atol=1e-5)
        in_use = kv.store.pages_in_use
        for _ in range(SIZE + 2):
            subject.step()
        kv.check_integrity()
    store = lab.owner.model.rheo._store
    assert store.pages_in_use < in_use
    lab.reservoir.ensure(5 * CONTEXT // SIZE)
    with lab.ours(Rheo.name, 1, CONTEXT) as subject:  # a reservoir that grew does not spread what a row gets
        assert max(subject.executor.cache.pages[0]) <= lab.reservoir.open_pages + CONTEXT // SIZE
    lab.reservoir.close()
    assert store.pages_in_use == 0


def test_rows_share_pages_when_the_reservoir_is_small(lab):
    limit = (CONTEXT // SIZE) * lab.page_bytes
    with lab.ours(Rheo.name, 3, CONTEXT, reservoir_bytes=limit) as subject:
        pages = [row[: CONTEXT // SIZE] for row in subject.executor.cache.pages]
        assert pages[0] == pages[1] == pages[2]
        assert len({row[-1] for row in subject.executor.cache.pages}) == 3, "open pages are a row's own"
        assert (subject.distinct_rows, subject.note) == (1, "3 rows share the host pages of 1")
        full, shared = (lab.cost(3, CONTEXT, sparse=True, distinct=n) for n in (3, 1))
        assert shared.summary_bytes == full.summary_bytes // 3
        for _ in range(3):
            subject.step()
        subject.executor.cache.check_integrity()


# ---- arithmetic --------------------------------------------------------------------------------------------


def test_kernel_records_become_parts():
    records = [
        Kernel("append_kernel", 0, 10),
        Kernel("cutlass_80_gemm", 10, 30),
        Kernel("gather_kernel", 30, 90),
        Kernel("attend_fetch_kernel", 35, 60),
        Kernel("merge_kernel", 95, 100),
        Kernel("vectorized_gather_kernel", 100, 110),
    ]
    parts = parts_of(records, 2)
    us = {name: 2e3 * ms for name, ms in parts.items() if name != "launches"}
    assert us == pytest.approx(
        {
            "append": 10,
            "model": 30,
            "gather": 60,
            "attend": 25,
            "merge": 5,
            "span": 110,
            "idle": 5,
        }
    )
    assert parts["launches"] == 3
    assert union([Kernel("a", 0, 10), Kernel("b", 2, 4), Kernel("c", 8, 12)]) == 12


def measured(ms: float, **per_step: float) -> Measured:
    return Measured(Quantiles(ms, ms, ms, 1), 0.0, per_step)


def test_targets_are_the_issues_formulas(lab):
    with lab.ours(Rheo.name, 2, CONTEXT) as subject:
        cost = lab.cost(2, CONTEXT, sparse=True)
        attended = 2 * BUDGET_BLOCKS * SIZE * LAYERS * HEADS * 2 * 32 * 4
        assert cost.kv_bytes == attended
        target = resident.target_ms(lab, subject, 2, CONTEXT, measured(5.0))
        assert target == pytest.approx(5.0 + 1.1e3 * (attended + cost.summary_bytes) / 1e9 + 0.012 * LAYERS)
    found = measured(9.0, miss_blocks=10, selected_blocks=100, h2d_bytes=1e6)  # 10 ms over the link
    assert misses.allowance_ms(lab, found, 4.0) == pytest.approx(1.15 * (10 - 0.9 * 4.0) + 0.005 * LAYERS)
    assert misses.allowance_ms(lab, found, 40.0) == pytest.approx(0.005 * LAYERS)
    assert met(2.0, 2.0) == {"target": 2.0, "target_met": "true"}
    assert met(1.9, 2.0, least=True)["target_met"] == "false"


def test_memory_of_a_row_is_what_a_cache_takes(lab):
    """The batch under a cap is arithmetic: it must not promise less than what is allocated."""
    rows = 4
    with lab.ours(Rheo.name, rows, CONTEXT, lab.recorded("s64-heat")) as subject:
        extra = subject.selection.scores.nbytes + subject.selection.index.nbytes
        taken = subject.executor.cache.device_bytes + extra
        promised = rows * memory._our_row_bytes(lab, CONTEXT, lab.config.cache.capacity_ratio)
        assert 0.7 * promised <= taken <= 1.1 * promised
    with lab.baseline(DenseGraphStock, rows, CONTEXT) as dense:
        assert dense.device_kv_bytes() == pytest.approx(rows * memory._dense_row_bytes(lab, CONTEXT), rel=0.1)


def test_a_batch_that_does_not_fit_after_all_shrinks_and_says_so(lab, monkeypatch):
    real, asked = lab.baseline, []

    def baseline(kind, batch, context):
        asked.append(batch)
        if batch > 20:
            raise torch.OutOfMemoryError("no room")
        return real(kind, batch, context)

    monkeypatch.setattr(lab, "baseline", baseline)
    case = lambda batch: lab.baseline(DenseGraphStock, batch, 64)  # noqa: E731
    row = memory._run(lab, "dense-graph-stock", case, 22, 64, 2**30, "1 GiB")
    assert asked == [22, 21, 20] and row.batch == 20
    assert "2 larger batches did not fit" in row.note
    assert memory._run(lab, "dense-graph-stock", case, 0, 64, 2**30, "1 GiB") is None
    assert (lab.rows[-1].status, lab.rows[-1].batch) == ("oom", 0)


def test_flat_ranks_without_the_index(lab):
    with lab.ours(AllResident.name, 1, CONTEXT) as grouped:
        assert grouped.executor.index is not None
    with lab.ours(AllResident.name, 1, CONTEXT, Flat()) as flat:
        assert flat.executor.index is None and flat.executor.selector.name == "mean_key"


@pytest.mark.parametrize("rate", [None, 0.2])
def test_launch_choices_are_timed_in_real_steps(lab, rate, monkeypatch):
    """Each variant counts while it is timed, and the table is as before afterwards."""
    before, seen = list(launch.entries()), []
    real = step_sweep.step_parts

    def spy(subject, steps):
        seen.append(launch.launch_of("attend_splits", CPU, 2 * HEADS))
        return real(subject, 2) | {"missed": subject.stats()["miss_blocks"]}

    monkeypatch.setattr(step_sweep, "step_parts", spy)
    case = {"batch": 2, "context": CONTEXT, "variants": [[], [["attend_splits", {}, {"programs": 8}]]]}
    found = list(step_sweep.sweep(lab, case | ({} if rate is None else {"miss_rate": rate})))
    assert seen == [{}, {"programs": 8}] and launch.entries() == before
    assert [variant for variant, _ in found] == case["variants"]
    for _, parts in found:
        assert parts["attend"] > 0 and parts["decide"] > 0
        assert rate is None or parts["missed"] > 0


# ---- all of it ---------------------------------------------------------------------------------------------


def test_every_suite_runs_in_small(traces, tmp_path):
    out = tmp_path / "out"
    assert main(["targets", "--quick", "--traces", str(traces), "--out", str(out)]) == 0
    rows = read_rows(out / "rows.csv")
    assert {r["suite"] for r in rows} == set(SUITES)
    assert {r["status"] for r in rows} == {"ok"}, [r["error"] for r in rows if r["status"] != "ok"]
    found = {(r["suite"], r["metric"], r["baseline"]) for r in rows}
    for wanted in (
        ("resident", "step", "all-resident"),
        ("resident", "step", "no-attention-graph-stock"),
        ("resident", "long_over_short", "frozen"),
        ("misses", "exposed_transfer", "frozen"),
        ("misses", "exposed_transfer", "recorded"),
        ("misses", "step", "rheo"),
        ("breakdown", "part.decide", "recorded"),
        ("choosing", "choosing_share", "flat"),
        ("choosing", "choosing_share", "two-level"),
        ("memory", "speedup_over_dense-graph", "rheo"),
        ("peers", "speedup_over_fetch-then-attend-no-heat", "rheo"),
        ("peers", "step", "dense-graph-stock"),
        ("link", "rate", "rheo"),
        ("long-run", "recaptures", "engine"),
    ):
        assert wanted in found
    assert all((r["target"] is None) == (r["target_met"] == "") for r in rows)
    forced = [
        r for r in rows if r["suite"] == "misses" and r["baseline"] == "frozen" and r["metric"] == "step"
    ]
    assert [r["forced_miss_rate"] for r in forced] == [0.0, 0.2]
    assert forced[0]["missed_blocks"] == 0 < forced[1]["missed_blocks"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["speed"], "speed"),
        (["resident"], "--model"),
        (["resident", "cache.block_sze=16", "--quick"], "cache.block_size"),
        (["memory", "--quick", "--contexts", "16k"], "--contexts must be numbers of tokens"),
    ],
)
def test_senseless_targets_are_refused_by_name(words, message, tmp_path, capsys):
    assert main(["targets", *words, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_a_wrong_configuration_has_no_times(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.targets.gate", lambda *args: "row 0 differs")
    assert main(["targets", "resident", "link", "--quick", "--out", str(tmp_path)]) == 1
    rows = read_rows(tmp_path / "rows.csv")
    assert [(r["suite"], r["status"], r["p50"]) for r in rows] == [
        ("resident", "wrong", None),
        ("link", "wrong", None),
    ]

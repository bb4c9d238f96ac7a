"""Dense attention through the engine: read in rounds while rows share the pool, from the pool once one row owns it."""

import pytest

from rheo_offload import offload
from rheo_offload.engine.engine import Engine
from tests.engine.test_engine import alone, ids_of, params
from tests.helpers.homes import DEVICE
from tests.helpers.tiny_model import tiny_model
from tests.test_end_to_end import sparse_config


@pytest.mark.parametrize("family", ["llama", pytest.param("gemma3", marks=pytest.mark.gpu)])
def test_rows_join_and_leave(family):
    """1. three rows share the slots. 2. two leave: the third gets all slots. 3. one joins: they are shared again."""
    model = offload(
        tiny_model(family, device=DEVICE),
        sparse_config("full", audit={"every": 0}, selection={"recent_blocks": 1}),
    )
    wanted = [(150, 70), (40, 6), (1, 9), (90, 12)]
    prompts = [ids_of(n, seed=n) for n, _ in wanted]
    expected = [alone(model, ids, new) for ids, (_, new) in zip(prompts, wanted, strict=True)]
    with Engine(model, max_rows=4, max_context_tokens=320) as engine:
        ex, kv = engine._ex, engine._kv
        layer = max(kv.full)

        def streamed():
            return ex.is_streamed(kv.full[layer])

        requests = [
            engine.submit(ids, params(new)) for ids, (_, new) in zip(prompts[:3], wanted, strict=False)
        ]
        engine.step()
        assert streamed()
        while streamed() and not requests[0].is_done:
            engine.step()
        assert kv.sharing_rows == 1 and kv.lengths[0] > 180, (
            "the long row owns every slot while it still runs"
        )
        for _ in range(6):
            engine.step()
        requests.append(engine.submit(prompts[3], params(wanted[3][1])))
        engine.step()
        assert streamed() and kv.sharing_rows == 2
        engine.run()
        assert [r.output_ids for r in requests] == expected
        kv.check_integrity()
        assert engine.stats().streamed_h2d_bytes > 0
        if DEVICE == "cuda":
            assert engine.stepper.runner.captures >= 4, "every way of attending was captured"

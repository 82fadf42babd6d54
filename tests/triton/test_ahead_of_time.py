"""What the Triton kernels compile to for GPUs that are not here: see ahead_of_time.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from slow import wanted

STATISTICS = "outlier_statistics_partial_kernel"
MERGE = "outlier_statistics_merge_kernel"
GRADIENT = "outlier_statistics_backward_gradient_kernel"
FAKE_QUANT = "fake_quant_forward_kernel"
FAKE_QUANT_GRADIENT = "fake_quant_backward_backward_kernel"
ERRORS = "quantization_errors_errors_kernel"

KERNELS = {STATISTICS, MERGE, GRADIENT, FAKE_QUANT, FAKE_QUANT_GRADIENT, ERRORS}
READING_ONE = {STATISTICS, FAKE_QUANT, ERRORS}
# rows without a gradient are copied, and whole tiles need no masks
STORING_TWICE = {GRADIENT, FAKE_QUANT}
WIDE_LOADS = {"ld.global.v4.b32", "global_load_dwordx4", "buffer_load_dwordx4"}
WIDE_SAMPLE_LOADS = {*WIDE_LOADS, "flat_load_dwordx4"}
WIDE_STORES = {"st.global.v4.b32", "global_store_dwordx4", "buffer_store_dwordx4"}
# with 128 threads, 128 registers leave room for four programs on a multiprocessor, and 96 for five
REGISTERS = {
    STATISTICS: 128,
    GRADIENT: 96,
    FAKE_QUANT: 96,
    FAKE_QUANT_GRADIENT: 96,
    ERRORS: 128,
}
# gfx942 holds 64 elements of bfloat16 in more
MORE_REGISTERS = {"gfx942": {FAKE_QUANT: 160, FAKE_QUANT_GRADIENT: 112}}
# Instructions of a thread per element of bfloat16 on the shortest way, of ERRORS per candidate too;
# benchmarks/gpu/instructions.py tells what memory leaves time for. Where a third or a sixth of the
# elements is sampled, some do more.
BUDGET = {
    STATISTICS: 9,
    GRADIENT: 18,
    FAKE_QUANT: 10.5,
    FAKE_QUANT_GRADIENT: 10,
    ERRORS: 16,
}
SAMPLED_BUDGET = {STATISTICS: 12.5, GRADIENT: 26}
PADDED_BUDGET = SAMPLED_BUDGET | {GRADIENT: 38}  # whose tiles are smaller, and begin inside strata
# with a scale per row or column
CHANNELS_BUDGET = {FAKE_QUANT: 22, FAKE_QUANT_GRADIENT: 18}

OF_CASE = {
    "vision": SAMPLED_BUDGET,
    "padded": PADDED_BUDGET,
    "last axis": CHANNELS_BUDGET,
}

TARGETS = ["sm_80", "sm_90", "gfx942"]


@pytest.fixture(scope="module")
def all_audits(request):
    """Compile in a process of its own: this one may interpret Triton, and that cannot be undone."""
    script = Path(__file__).with_name("ahead_of_time.py")
    targets = wanted(request, "audits")
    environment = {name: os.environ[name] for name in os.environ if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, script, *targets], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(params=TARGETS)
def audits(request, all_audits):
    return [audit for audit in all_audits if audit["target"] == request.param]


def check(audits, holds):
    broken = [
        {name: value for name, value in audit.items() if name != "instructions"}
        for audit in audits
        if not holds(audit)
    ]
    assert not broken


def mnemonics(audit, *parts):
    return [name for name in audit["instructions"] if any(part in name for part in parts)]


def streams(audits):
    """The kernels and cases whose speed is that of the memory."""
    return [audit for audit in audits if audit["kernel"] != MERGE and is_regular(audit)]


def is_regular(audit):
    return audit["case"] not in ("one", "convolution", "odd padded")


def test_every_kernel_is_compiled(audits):
    assert {audit["kernel"] for audit in audits} == KERNELS
    check(audits, lambda audit: len(audit["instructions"]) > 50)


def test_a_program_fits_a_multiprocessor(audits):
    check(audits, lambda audit: audit["threads"] <= 1024 and audit["shared"] <= 48 * 1024)
    most = REGISTERS | MORE_REGISTERS.get(audits[0]["target"], {})
    check(streams(audits), lambda audit: audit["registers"] <= most[audit["kernel"]])


def test_nothing_spills(audits):
    wide_merge = [audit for audit in audits if (audit["kernel"], audit["type"]) == (MERGE, "fp32")]
    others = [audit for audit in audits if audit not in wide_merge]
    check(others, lambda audit: audit["spills"] == 0)
    # 1,024 threads have 64 registers each, and those of float32 load 64 keys: some spill once
    check(wide_merge, lambda audit: audit["spills"] <= 128)
    check(audits, lambda audit: audit.get("loop_spills", 0) == 0)
    looping = [audit for audit in audits if audit["kernel"] in (STATISTICS, MERGE)]
    check(looping, lambda audit: audit.get("loops", 1) > 0)


def test_memory_is_accessed_16_bytes_at_a_time(audits):
    for audit in streams(audits):
        # 16 bytes are 8 elements, or 4 of float32
        half_width = audit["type"] != "fp32"
        loads = len([name for name in audit["instructions"] if name in WIDE_LOADS])
        stores = len([name for name in audit["instructions"] if name in WIDE_STORES])
        elements = audit["elements"] // (8 if half_width else 4)
        tensors_read = 1 if audit["kernel"] in READING_ONE else 2
        assert loads >= elements * tensors_read, audit["case"]
        if audit["kernel"] not in (STATISTICS, ERRORS):  # which store sums and samples
            # of two ways gfx942 may share the stores
            ways = {1, 2} if audit["kernel"] in STORING_TWICE else {1}
            assert stores in {way * elements for way in ways}, audit["case"]


def test_the_merge_reads_samples_16_bytes_at_a_time(audits):
    merges = [audit for audit in audits if audit["kernel"] == MERGE and is_regular(audit)]
    check(merges, lambda audit: not mnemonics(audit, "ld.global.b16", "load_ushort"))
    check(merges, lambda audit: any(name in audit["instructions"] for name in WIDE_SAMPLE_LOADS))


def test_instructions_per_element(audits):
    for audit in streams(audits):
        if audit["target"] != "sm_90" or audit["type"] != "bf16":
            continue
        budget = BUDGET | OF_CASE.get(audit["case"], {})
        count = audit["main_loop"] / audit["elements"]
        assert count <= budget[audit["kernel"]], (audit["kernel"], audit["case"], count)


def test_nothing_is_atomic(audits):
    check(audits, lambda audit: not mnemonics(audit, "atom"))
    reductions = ("red.", "redg.", "global_red", "buffer_red")  # st.shared.b32 is none
    check(audits, lambda a: not [n for n in a["instructions"] if n.startswith(reductions)])


def test_every_rounding_is_the_definition_s(audits):
    quantizing = [audit for audit in audits if audit["kernel"] in (FAKE_QUANT, ERRORS)]
    check(quantizing, lambda audit: mnemonics(audit, "div.rn.f32", "v_div_fixup_f32"))
    if audits[0]["target"].startswith("sm_"):
        # gfx942 divides by way of these
        check(audits, lambda audit: not mnemonics(audit, "mad.rn", "rcp"))
        check(audits, lambda audit: not mnemonics(audit, ".approx", ".full", ".ftz"))
        # those that are asked for: one per element and way, and the rest of 1 / scale
        plain = [a for a in audits if a["kernel"] in (MERGE, FAKE_QUANT_GRADIENT)]
        check(plain, lambda audit: not mnemonics(audit, "fma"))
        ways = {FAKE_QUANT: 2, ERRORS: 1}
        tensors = [audit for audit in quantizing if audit["case"] == "tensor"]
        assert tensors
        check(
            tensors,
            lambda a: len(mnemonics(a, "fma")) == ways[a["kernel"]] * (a["elements"] + 1),
        )


def test_the_median_s_gradient_is_stored_after_the_others(audits):
    """One program stores all elements, then, behind a barrier, those at the median again."""
    narrow = ("st.global.b16", "st.global.b32", "global_store_short", "global_store_dword")
    sparse = [
        audit
        for audit in audits
        if audit["kernel"] == GRADIENT and audit["case"] in ("long", "vision")
    ]
    assert sparse
    for audit in sparse:
        names = audit["instructions"]
        dense = [at for at, name in enumerate(names) if name in WIDE_STORES]
        dense = dense[: len(dense) // 2]  # the others copy rows without a gradient
        sparse_stores = [at for at, name in enumerate(names) if name in narrow]
        barriers = [at for at, name in enumerate(names) if name.startswith(("bar", "s_barrier"))]
        assert dense
        assert sparse_stores
        assert any(max(dense) < barrier < min(sparse_stores) for barrier in barriers)

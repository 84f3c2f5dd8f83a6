"""bench.cuda_check: what it reads from a disassembly, what it refuses, and a few kernels compiled for GPUs on this machine."""

import json
from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install longvita[triton]")

from bench import cuda_check  # noqa: E402

_SASS = """
.L_x_0:
        /*0010*/ STL [R1], R2 ;
.L_x_1:
        /*0020*/ HGMMA.64x256x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0030*/ {inner} ;
        /*0040*/ @P0 BRA `(.L_x_1) ;
        /*0050*/ LDL R2, [R1] ;
        /*0060*/ @P1 BRA `(.L_x_0) ;
        /*0070*/ BRA `(.L_x_2) ;
.L_x_2:
"""
_RESOURCES = "Function k: REG:168 STACK:8 SHARED:0 LOCAL:0"
GOOD = {
    "registers": 168, "stack": 8, "shared": 1024, "spills": 2, "loop_spills": 0, "multiplies_with": ["HGMMA"], "main_loops": 1,
}  # fmt: skip


def test_only_the_innermost_loop_counts():
    assert cuda_check.figures(_SASS.format(inner="MOV R1, R2"), _RESOURCES, 1024, True) == GOOD
    spilled = cuda_check.figures(_SASS.format(inner="LDL R2, [R1]"), _RESOURCES, 1024, True)
    assert spilled["loop_spills"] == 1 and spilled["spills"] == 3
    assert cuda_check.figures(_SASS.replace("HGMMA", "FFMA").format(inner="LDL"), _RESOURCES, 0, False)["loop_spills"] == 1


@pytest.mark.parametrize(
    ("change", "capability", "matrix", "words"),
    [
        ({"loop_spills": 3}, 80, False, "3 instructions in its main loop move spilled registers"),
        ({"shared": 170_000}, 80, True, "170000 bytes of shared memory; sm_80 has 166912"),
        ({"multiplies_with": ["HMMA"]}, 90, True, "multiplies with HMMA, not with wgmma"),
        ({"multiplies_with": [], "main_loops": 0}, 100, True, "no loop of it multiplies matrices"),
    ],
)
def test_what_is_refused(change, capability, matrix, words):
    (found,) = cuda_check.problems("k", capability, matrix, GOOD | change)
    assert words in found


def test_what_passes():
    assert not cuda_check.problems("k", 90, True, GOOD)
    assert not cuda_check.problems("k", 80, True, GOOD | {"multiplies_with": ["HMMA"]})
    assert not cuda_check.problems("k", 90, False, GOOD | {"multiplies_with": [], "main_loops": 0})


def test_regressions():
    assert not cuda_check.regressions("k", 90, GOOD | {"registers": 175}, GOOD)
    for change in ({"registers": 176}, {"stack": 9}, {"shared": 1025}, {"spills": 3}):
        (what,) = change
        assert f"{what} rose from {GOOD[what]} to {change[what]}" in cuda_check.regressions("k", 90, GOOD | change, GOOD)[0]
    assert "not in compile.json" in cuda_check.regressions("k", 90, GOOD, None)[0]


def test_the_table_names_kernels_that_exist_and_pass():
    """That it names all of them is for make cuda-check to say, which compiles them."""
    table, specs = json.loads(cuda_check.TABLE.read_text()), cuda_check.specs()
    kept = {(name, int(arch.removeprefix("sm_"))): found for name, row in table["kernels"].items() for arch, found in row.items()}
    assert kept and set(kept) <= set(specs)
    for (name, capability), found in kept.items():
        assert not cuda_check.problems(name, capability, specs[name, capability].matrix, found)


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_a_kernel_compiles_here(capability, capsys):
    kernel = "masked_lm_head forward, few rows bf16"
    assert cuda_check.main(["--only", kernel, "--capability", str(capability), "--jobs", "1"]) == 0
    assert {80: " HMMA", 90: " HGMMA", 100: " UTCHMMA"}[capability] in capsys.readouterr().out


def test_blocks_too_small_for_wgmma_are_found(monkeypatch):
    key = ("masked_lm_head forward, few rows bf16", 90)
    small = replace(cuda_check.specs()[key], constexprs=cuda_check.specs()[key].constexprs | {"BLOCK_M": 32})
    monkeypatch.setitem(cuda_check.specs(), key, small)
    _, found = cuda_check.compile_one(key)
    assert "not with wgmma" in cuda_check.problems(*key, True, found)[0]

"""Messages of the library in the words of the command line."""

import pytest

from quanttune.cli.language import in_options


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("Lower alpha, or pass balance='initial'", "Lower alpha, or pass --balance initial"),
        ('use balance="none"', "use --balance none"),
        ("with symmetric=False it must", "with --no-symmetric it must"),
        ("exclude=[...] says so", "--exclude says so"),
        ("include=['a*', 'b'] and exclude=[]", "--include a* --include b and no --exclude"),
        ("this needs detach_deviation=False", "this needs no --detach-deviation"),
        ("detach_deviation=True is for", "--detach-deviation is for"),
        ("coverage='full' rounds it", "--coverage full rounds it"),
        ("overrides=['head']", "--override head"),
        ("act_dtype='uint8' for ONNX Runtime", "--act-dtype uint8 for ONNX Runtime"),
        ("decay='linear' needs", "--decay linear needs"),
        ("GPTQ(act_order=True)", "GPTQ(act_order=True)"),  # no option
        ("run/lr=3/model", "run/lr=3/model"),
    ],
)
def test_arguments_become_options(said, expected):
    assert in_options(said) == expected

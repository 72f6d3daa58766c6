"""Another default dtype, such as `Trainer(precision="bf16-true")` sets, changes no op's numbers."""

import pytest
import torch
from op_cases import NAMES, check_default_dtype, op_cases


def test_every_case_has_a_name() -> None:
    assert tuple(op_cases("cpu")) == NAMES


@pytest.mark.parametrize("default", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_numbers_do_not_depend_on_the_default_dtype(name: str, default: torch.dtype) -> None:
    check_default_dtype(name, "cpu", default)
